// The sorted correlation matrix: one picture of M x M bins under Plotly's axes, and what is under the pointer.

const MATRIX = document.getElementById("matrix-plot");
const READOUT = document.getElementById("matrix-readout");
const BINS = DATA.matrix.size;
const LEVELS = decode(DATA.matrix.levels); // [M, M] int8, R in units of 1/127
const ORDER = decode(DATA.matrix.order); // [n] sample numbers, sorted

function binStart(bin) {
  return Math.ceil((bin * ORDER.length) / BINS);
}

function matrixPicture() {
  const colors = lookup(diverging());
  const canvas = element("canvas", { width: BINS, height: BINS });
  const context = canvas.getContext("2d");
  const image = context.createImageData(BINS, BINS);
  const limit = DATA.matrix.limit * 127;
  for (let i = 0; i < LEVELS.length; i++) {
    const share = Math.min(Math.max(LEVELS[i] / limit, -1), 1);
    const [red, green, blue] = colors[Math.round(127.5 + 127.5 * share)];
    image.data[4 * i] = red;
    image.data[4 * i + 1] = green;
    image.data[4 * i + 2] = blue;
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL("image/png");
}

function matrixLayout(marks) {
  const { edges, groups } = DATA.matrix;
  const scale = BINS / ORDER.length;
  const middles = edges.slice(1).map((end, i) => ((edges[i] + end) / 2) * scale);
  const few = groups.length && groups.length <= 40;
  const ticks = few
    ? { tickmode: "array", tickvals: middles, ticktext: groups.map(plain), tickangle: groups.length > 6 ? -40 : 0 }
    : { showticklabels: false };
  const axis = { range: [0, BINS], showgrid: false, zeroline: false, ticks: "", constrain: "domain", constraintoward: "right", ...ticks };
  const line = (more) => ({ type: "line", line: { color: css("muted"), width: 0.6 }, ...more });
  const inner = few ? edges.slice(1, -1).map((edge) => edge * scale) : [];
  const shapes = inner.flatMap((at) => [
    line({ x0: at, x1: at, y0: 0, y1: BINS }), line({ x0: 0, x1: BINS, y0: at, y1: at })]);
  return layout({
    dragmode: "pan", hovermode: false, margin: { l: 8, r: 8, t: 8, b: 8 },
    xaxis: { ...axis, title: title(DATA.matrix.sorted) },
    yaxis: { ...axis, range: [BINS, 0], tickangle: 0, scaleanchor: "x", constraintoward: "top" },
    images: [{ source: matrixPicture(), xref: "x", yref: "y", x: 0, y: 0, sizex: BINS, sizey: BINS,
      xanchor: "left", yanchor: "top", sizing: "stretch", layer: "below" }],
    shapes: [...shapes, ...marks],
  });
}

/** A trace that shows nothing but the color bar. */
function matrixBar() {
  const limit = DATA.matrix.limit;
  return {
    type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip",
    marker: { color: [0], colorscale: diverging(), cmin: -limit, cmax: limit, showscale: true,
      colorbar: { thickness: 12, len: 0.9, outlinewidth: 0, title: { text: "correlation R (no unit)", side: "right" } } },
  };
}

function selectionMarks(sample) {
  if (sample === null) return [];
  const place = ORDER.indexOf(sample);
  if (place < 0) return [];
  const at = Math.floor((place * BINS) / ORDER.length) + 0.5;
  const line = { color: css("accent"), width: 1.5, dash: "dot" };
  return [{ type: "line", x0: at, x1: at, y0: 0, y1: BINS, line }, { type: "line", x0: 0, x1: BINS, y0: at, y1: at, line }];
}

async function drawMatrix() {
  await Plotly.newPlot(MATRIX, [matrixBar()], matrixLayout(selectionMarks(selected)), { ...CONFIG, scrollZoom: true });
  sharpen();
  MATRIX.on("plotly_relayout", sharpen);
}

function markOnMatrix(sample) {
  const { shapes } = matrixShapes(sample);
  Plotly.relayout(MATRIX, { shapes });
}

function matrixShapes(sample) {
  const kept = (MATRIX.layout.shapes || []).filter((shape) => shape.line.dash !== "dot");
  return { shapes: [...kept, ...selectionMarks(sample)] };
}

/** Enlarged, bins are squares; reduced, they are averaged. */
function sharpen() {
  const { xaxis } = MATRIX._fullLayout;
  const shown = Math.abs(xaxis.range[1] - xaxis.range[0]);
  MATRIX.classList.toggle("enlarged", shown < xaxis._length);
}

/** The bins [row, column] under the pointer, or null. */
function cellAt(event) {
  const { xaxis, yaxis } = MATRIX._fullLayout;
  const area = MATRIX.querySelector(".nsewdrag").getBoundingClientRect();
  const cell = [yaxis.p2d(event.clientY - area.top), xaxis.p2d(event.clientX - area.left)].map(Math.floor);
  return cell.every((bin) => bin >= 0 && bin < BINS) ? cell : null;
}

function binName(bin) {
  const [start, stop] = [binStart(bin), binStart(bin + 1)];
  const first = ORDER[start];
  const label = SAMPLE.label ? `, ${className(SAMPLE.label[first])}` : "";
  const many = stop - start > 1 ? ` and ${stop - start - 1} more` : "";
  return `${DATA.unit} ${first}${many}${label}`;
}

function readMatrix(event) {
  const cell = cellAt(event);
  if (!cell) return;
  const value = LEVELS[cell[0] * BINS + cell[1]] / 127;
  const side = (bin) => element("div", { class: "pair" }, ...[thumbnail(ORDER[binStart(bin)], 56),
    element("span", { text: binName(bin) })].filter((part) => part !== null));
  READOUT.replaceChildren(element("p", { class: "value", text: `R = ${fixed(value)}` }), side(cell[0]), side(cell[1]));
}

function matrixHome() {
  return Plotly.relayout(MATRIX, { "xaxis.range": [0, BINS], "yaxis.range": [BINS, 0] });
}

function zoomMatrix(factor) {
  const { xaxis, yaxis } = MATRIX._fullLayout;
  const zoomed = ([low, high]) => [(low + high) / 2 - ((high - low) / 2) * factor, (low + high) / 2 + ((high - low) / 2) * factor];
  return Plotly.relayout(MATRIX, { "xaxis.range": zoomed(xaxis.range), "yaxis.range": zoomed(yaxis.range) });
}

let pressed = null;

function listenToMatrix() {
  MATRIX.addEventListener("pointermove", readMatrix);
  MATRIX.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; }, true);
  MATRIX.addEventListener("click", (event) => {
    const moved = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4;
    const cell = moved ? null : cellAt(event);
    if (cell) select(ORDER[binStart(cell[0])]);
  }, true);
}
