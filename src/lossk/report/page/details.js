// One sample and its neighbors, beside the map; and the card that follows the pointer.

const CARD = document.getElementById("card");
const DETAILS = document.getElementById("details");

function row(name, value) {
  return [element("dt", { text: name }), element("dd", { text: value })];
}

function numbers(sample) {
  const list = element("dl", { class: "numbers" });
  list.append(
    ...row("mean loss", `${format(SAMPLE.mean_loss[sample])} nats`),
    ...row("self-covariance", `${format(SAMPLE.variance[sample])} nats\u00b2, ${rank(sample)}`),
    ...row("noise floor", `R = ${fixed(SAMPLE.noise_floor[sample])}`),
  );
  if (SAMPLE.cluster) {
    const found = SAMPLE.cluster[sample];
    list.append(...row("cluster", found < 0 ? "none" : String(found)));
  }
  return list;
}

function rank(sample) {
  let above = 0;
  for (let i = 0; i < N; i++) if (SAMPLE.variance[i] > SAMPLE.variance[sample]) above++;
  return `rank ${(above + 1).toLocaleString("en")} of ${N.toLocaleString("en")}`;
}

/** The neighbors of one kind that a sample has: [{sample, correlation, error, significant}]. */
function neighborsOf(sample, kind) {
  const found = NEIGHBORS[kind];
  if (!found) return [];
  const rows = [];
  for (let at = sample * found.k; at < (sample + 1) * found.k; at++) {
    if (found.index[at] < 0) break;
    rows.push({
      sample: found.index[at],
      correlation: found.correlation[at] / SCALE,
      error: found.error[at] / SCALE,
      significant: found.significant[at] === 1,
    });
  }
  return rows;
}

function neighborRow(found) {
  const link = element("a", { href: "#map", "data-sample": found.sample });
  const picture = thumbnail(found.sample, 30);
  if (picture) link.append(picture);
  link.append(element("span", { class: "who", text: `${found.sample}` }));
  const label = SAMPLE.label ? className(SAMPLE.label[found.sample]) : textOf(found.sample) || "";
  const verdict = found.significant ? "significant" : "within noise";
  return element("tr", { class: found.significant ? "" : "noise" },
    element("td", {}, link),
    element("td", { class: "label", title: textOf(found.sample) || label, text: label }),
    element("td", { class: "number", text: `${fixed(found.correlation)} \u00b1 ${fixed(found.error)}` }),
    element("td", { text: found.significant ? "\u25cf" : "\u25cb", title: verdict, "aria-label": verdict }));
}

function neighborTable(sample, kind, heading) {
  const rows = neighborsOf(sample, kind);
  if (!rows.length) return null;
  const head = element("tr", {}, ...[DATA.unit, SAMPLE.label ? "label" : "", "R \u00b1 standard error", ""].map(
    (text) => element("th", { scope: "col", text })));
  return element("table", { class: "neighbors", "data-kind": kind },
    element("caption", { text: heading }), element("thead", {}, head), element("tbody", {}, ...rows.map(neighborRow)));
}

function showDetails(sample) {
  const parts = [element("h3", { text: `${DATA.unit[0].toUpperCase()}${DATA.unit.slice(1)} ${sample}` })];
  const top = element("div", { class: "top" });
  const picture = thumbnail(sample, 112);
  if (picture) top.append(picture);
  const about = element("div", {}, element("p", { class: "about", text: describe(sample) }), numbers(sample));
  top.append(about);
  parts.push(top);
  const text = textOf(sample);
  if (text) parts.push(element("blockquote", { text }));
  const dead = !(SAMPLE.variance[sample] > 0);
  if (dead) parts.push(element("p", { text: "Its loss never varied: it has no neighbors and no place on the map." }));
  parts.push(neighborTable(sample, "near", "Most correlated"));
  parts.push(neighborTable(sample, "far", "Most anti-correlated"));
  parts.push(element("p", { class: "note", text:
    "\u25cf beyond the noise floor, \u25cb within what chance alone would show." }));
  DETAILS.replaceChildren(...parts.filter((part) => part !== null));
}

function showCard(sample, event) {
  const picture = thumbnail(sample, 84);
  const lines = element("div", {},
    element("strong", { text: `${DATA.unit} ${sample}` }),
    element("div", { text: describe(sample) }),
    element("div", { text: `loss ${format(SAMPLE.mean_loss[sample])} nats` }));
  const text = textOf(sample);
  if (text) lines.append(element("div", { class: "text", text: text.length > 200 ? `${text.slice(0, 200)}\u2026` : text }));
  CARD.replaceChildren(...[picture, lines].filter((part) => part !== null));
  placeCard(event);
}

function placeCard(event) {
  CARD.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = CARD;
  const right = event.clientX + 16 + width < window.innerWidth;
  const below = event.clientY + 16 + height < window.innerHeight;
  CARD.style.left = `${right ? event.clientX + 16 : event.clientX - 16 - width}px`;
  CARD.style.top = `${below ? event.clientY + 16 : event.clientY - 16 - height}px`;
}

function hideCard() {
  CARD.hidden = true;
}
