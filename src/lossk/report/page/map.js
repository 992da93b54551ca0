// The map: every sample a point (points.js draws them), between axes and marks that Plotly draws.

const MAP = document.getElementById("map-plot");
const LEGEND = document.getElementById("legend");
const COLOR = document.getElementById("color");
const [POINTS, LINKS, RINGS, BAR] = [0, 1, 2, 3]; // traces
let only = null; // the one group shown in color, or null
let home = null; // ranges of the whole map

function pointSize() {
  if (N <= 1500) return 8;
  if (N <= 6000) return 5.5;
  return N <= 20000 ? 4 : 3;
}

/** What points can be colored by: {name: {kind: "group", values, names} or {kind: "value", values, unit, log}}. */
function colorings() {
  const found = {};
  if (SAMPLE.label) found.class = { kind: "group", values: SAMPLE.label, names: groupNames(SAMPLE.label, className) };
  found["mean loss"] = { kind: "value", values: SAMPLE.mean_loss, unit: "nats", log: true };
  found["self-covariance"] = { kind: "value", values: SAMPLE.variance, unit: "nats\u00b2", log: true };
  if (SAMPLE.cluster) {
    const name = (i) => (i < 0 ? "none" : `cluster ${i}`);
    found.cluster = { kind: "group", values: SAMPLE.cluster, names: groupNames(SAMPLE.cluster, name) };
  }
  if (SAMPLE.prediction) {
    const name = (i) => className(i);
    found.prediction = { kind: "group", values: SAMPLE.prediction, names: groupNames(SAMPLE.prediction, name) };
  }
  if (SAMPLE.held_out) {
    const name = (i) => ["trained on", "held out"][i];
    found["trained on or not"] = { kind: "group", values: SAMPLE.held_out, names: groupNames(SAMPLE.held_out, name) };
  }
  return found;
}

/** Names by group number, from the numbers that occur. */
function groupNames(values, name) {
  const last = values.reduce((most, value) => Math.max(most, value), -1);
  const names = Array.from({ length: last + 1 }, (_, i) => name(i));
  return names;
}

const COLORINGS = colorings();

/** Color the points; the marker of the trace that shows the color bar, if there is one to show. */
function paint() {
  const chosen = COLORINGS[COLOR.value];
  return chosen.kind === "group" ? paintGroups(chosen) : paintValues(chosen);
}

function paintGroups({ values, names }) {
  const gray = names.length; // in no group, or not asked for
  colorPoints([...groupColors(names.length), css("faint")],
    Uint16Array.from(values, (v) => (v < 0 || (only !== null && v !== only) ? gray : v)));
  return { color: css("muted"), showscale: false };
}

/** Values between their 1 % and 99 % quantiles, in decades where they span more than one. */
function paintValues({ values, unit, log }) {
  const sorted = Float32Array.from(values.filter((v) => Number.isFinite(v) && (!log || v > 0))).sort();
  if (!sorted.length) {
    colorPoints([css("muted")], new Uint16Array(N));
    return { color: css("muted"), showscale: false };
  }
  const low = sorted[Math.floor(0.01 * (sorted.length - 1))];
  const high = sorted[Math.ceil(0.99 * (sorted.length - 1))];
  const decades = log && high > 10 * low;
  const of = decades ? (v) => Math.log10(Math.max(v, low)) : (v) => v;
  const [cmin, cmax] = [of(low), of(high) > of(low) ? of(high) : of(low) + 1];
  const bar = { thickness: 12, len: 0.9, outlinewidth: 0, title: { text: `${COLOR.value}, ${unit}`, side: "right" } };
  if (decades) Object.assign(bar, decadeTicks(low, high));
  const scale = DARK.matches ? VIRIDIS : VIRIDIS.map(([at], i) => [at, VIRIDIS[VIRIDIS.length - 1 - i][1]]);
  const level = (v) => Math.round(255 * Math.min(Math.max((of(v) - cmin) / (cmax - cmin), 0), 1)) || 0; // 0 for NaN
  colorPoints(lookup(scale).map((rgb) => `rgb(${rgb.join(" ")})`), Uint16Array.from(values, level));
  return { color: [cmin], colorscale: scale, cmin, cmax, showscale: true, colorbar: bar };
}

function decadeTicks(low, high) {
  const ticks = [];
  for (let power = Math.ceil(Math.log10(low)); power <= Math.floor(Math.log10(high)); power++) ticks.push(power);
  const names = ticks.map((power) => (Math.abs(power) <= 3 ? String(Number((10 ** power).toPrecision(1))) : `1e${power}`));
  return { tickmode: "array", tickvals: ticks, ticktext: names };
}

function overlay(name, more) {
  return { type: "scatter", name, x: [], y: [], hoverinfo: "skip", ...more };
}

function mapTraces() {
  return [
    { type: "scatter", name: "points", mode: "none", x: SAMPLE.x, y: SAMPLE.y, hoverinfo: "none", hoveron: "points" },
    overlay("links", { mode: "lines", line: { color: css("ink"), width: 1 } }),
    overlay("rings", { mode: "markers", marker: { size: 13, color: "rgba(0,0,0,0)", line: { color: css("ink"), width: 1.5 } } }),
    overlay("bar", { mode: "markers", x: [null], y: [null], marker: paint() }),
  ];
}

function mapLayout() {
  const bare = { showgrid: false, zeroline: false, showticklabels: false, ticks: "" };
  return layout({
    dragmode: "pan", hovermode: "closest", hoverdistance: 12, margin: { l: 30, r: 12, t: 8, b: 30 },
    xaxis: { ...bare, title: title("UMAP 1 (no unit: nearness counts, distance does not)"), range: home?.x },
    yaxis: { ...bare, title: title("UMAP 2"), range: home?.y, scaleanchor: "x" },
    uirevision: "kept",
  });
}

function wholeMap() {
  const span = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const v of values) if (Number.isFinite(v)) [low, high] = [Math.min(low, v), Math.max(high, v)];
    const pad = 0.04 * (high - low || 1);
    return [low - pad, high + pad];
  };
  return { x: span(SAMPLE.x), y: span(SAMPLE.y) };
}

async function drawMap() {
  home = wholeMap();
  await Plotly.newPlot(MAP, mapTraces(), mapLayout(), { ...CONFIG, scrollZoom: true });
  for (const moved of ["plotly_afterplot", "plotly_relayouting"]) MAP.on(moved, drawPoints);
  MAP.on("plotly_hover", ({ points, event }) => showCard(points[0].pointNumber, event));
  MAP.on("plotly_unhover", hideCard);
  MAP.on("plotly_click", ({ points }) => points[0].curveNumber === POINTS && select(points[0].pointNumber));
  drawLegend();
}

function recolorMap() {
  only = null;
  return repaint();
}

function repaint() {
  drawLegend();
  return Plotly.restyle(MAP, { marker: paint() }, [BAR]);
}

function drawLegend() {
  const chosen = COLORINGS[COLOR.value];
  LEGEND.replaceChildren();
  if (chosen.kind !== "group") {
    LEGEND.append(element("span", { class: "note", text: "Colors end at the 1 % and 99 % quantiles." }));
    return;
  }
  const colors = groupColors(chosen.names.length);
  if (chosen.names.length > 40) {
    LEGEND.append(element("span", { class: "note", text: `${new Set(chosen.values).size} groups, hues in their order.` }));
    return;
  }
  chosen.names.forEach((name, i) => {
    const swatch = element("span", { class: "swatch" });
    swatch.style.background = colors[i];
    const button = element("button", { type: "button", "aria-pressed": String(only === i), title: "show this one alone" },
      swatch, element("span", { text: name }));
    button.addEventListener("click", () => {
      only = only === i ? null : i;
      repaint().then(() => LEGEND.children[i].focus());
    });
    LEGEND.append(button);
  });
}

/** Mark a sample and its neighbors, and bring it into view. */
function markOnMap(sample) {
  const near = neighborsOf(sample, "near").filter((found) => Number.isFinite(SAMPLE.x[found.sample]));
  const at = (values) => near.map((found) => values[found.sample]);
  const sure = near.filter((found) => found.significant);
  const links = (values) => sure.flatMap((found) => [values[sample], values[found.sample], null]);
  const { x, y } = SAMPLE;
  Plotly.restyle(MAP, {
    x: [links(x), at(x)],
    y: [links(y), at(y)],
  }, [LINKS, RINGS]);
  bringIntoView(x[sample], y[sample]);
}

function bringIntoView(x, y) {
  if (!Number.isFinite(x)) return;
  const ranges = currentRanges();
  const inside = x > ranges.x[0] && x < ranges.x[1] && y > ranges.y[0] && y < ranges.y[1];
  if (!inside) moveMap(x - (ranges.x[0] + ranges.x[1]) / 2, y - (ranges.y[0] + ranges.y[1]) / 2);
}

function currentRanges() {
  const { xaxis, yaxis } = MAP._fullLayout;
  return { x: [...xaxis.range], y: [...yaxis.range] };
}

function setRanges({ x, y }) {
  return Plotly.relayout(MAP, { "xaxis.range": x, "yaxis.range": y });
}

function moveMap(dx, dy) {
  const { x, y } = currentRanges();
  return setRanges({ x: x.map((v) => v + dx), y: y.map((v) => v + dy) });
}

function zoomMap(factor) {
  const zoomed = ([low, high]) => {
    const [middle, half] = [(low + high) / 2, ((high - low) / 2) * factor];
    return [middle - half, middle + half];
  };
  const { x, y } = currentRanges();
  return setRanges({ x: zoomed(x), y: zoomed(y) });
}

function resetMap() {
  return setRanges(home);
}

function mapKey(event) {
  const { x, y } = currentRanges();
  const [dx, dy] = [(x[1] - x[0]) / 8, (y[1] - y[0]) / 8];
  const moves = {
    ArrowLeft: () => moveMap(-dx, 0), ArrowRight: () => moveMap(dx, 0),
    ArrowUp: () => moveMap(0, dy), ArrowDown: () => moveMap(0, -dy),
    "+": () => zoomMap(0.7), "=": () => zoomMap(0.7), "-": () => zoomMap(1 / 0.7), 0: resetMap,
  };
  const move = moves[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  move();
}
