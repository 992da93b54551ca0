// The map's points, stamped on a canvas in Plotly's axes. Plotly's own way for so many, WebGL, builds functions from
// strings, which the page's policy forbids; it finds the point under the pointer, from a trace that draws nothing.

let stamps = { discs: [], of: [] }; // a disc for each color; of each sample the number of its disc
let asked = 0; // the frame in which they are drawn next, if any

/** A disc in a color, drawn once and then copied. */
function disc(color, size, ratio) {
  const side = Math.ceil((size + 2) * ratio);
  const canvas = element("canvas", { width: side, height: side });
  const context = canvas.getContext("2d");
  context.fillStyle = color;
  context.globalAlpha = N > 20000 ? 0.7 : 0.85;
  context.arc(side / 2, side / 2, (size * ratio) / 2, 0, 2 * Math.PI);
  context.fill();
  return canvas;
}

/** Color every sample: `colors[of[sample]]`. */
function colorPoints(colors, of) {
  const ratio = window.devicePixelRatio || 1;
  stamps = { discs: colors.map((color) => disc(color, pointSize(), ratio)), of };
  drawPoints();
}

function drawPoints() {
  if (!asked) asked = requestAnimationFrame(stampPoints);
}

/** The canvas, above links and rings, as large as the plot: marks around points that lie close do not cover them. */
function pointCanvas(width, height) {
  let canvas = MAP.querySelector("canvas.points");
  if (!canvas) {
    canvas = element("canvas", { class: "points" });
    MAP.querySelector(".gl-container").append(canvas);
  }
  const ratio = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const context = canvas.getContext("2d");
  return { context, ratio };
}

function stampPoints() {
  asked = 0;
  const { xaxis, yaxis, width, height } = MAP._fullLayout;
  const { context, ratio } = pointCanvas(width, height);
  context.beginPath();
  context.rect(xaxis._offset * ratio, yaxis._offset * ratio, xaxis._length * ratio, yaxis._length * ratio);
  context.clip();
  // From the ranges, which follow a drag that has not ended; Plotly's own factors do not.
  const [left, right] = xaxis.range;
  const [bottom, top] = yaxis.range;
  const [perX, perY] = [xaxis._length / (right - left), yaxis._length / (top - bottom)];
  const half = stamps.discs.length ? stamps.discs[0].width / 2 : 0;
  const place = (i) => [xaxis._offset + (SAMPLE.x[i] - left) * perX, yaxis._offset + (top - SAMPLE.y[i]) * perY];
  for (let i = 0; i < N; i++) {
    const [x, y] = place(i);
    if (x > -99 && y > -99 && x < width + 99 && y < height + 99) { // not NaN either: a dead sample has no place
      context.drawImage(stamps.discs[stamps.of[i]], Math.round(x * ratio - half), Math.round(y * ratio - half));
    }
  }
  if (selected !== null) ring(context, ...place(selected), ratio);
}

/** Above all points, and clear of them: the selected sample is found in any crowd. */
function ring(context, x, y, ratio) {
  for (const [color, lineWidth] of [[css("panel"), 7 * ratio], [css("accent"), 3.5 * ratio]]) {
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.beginPath();
    context.arc(x * ratio, y * ratio, 10 * ratio, 0, 2 * Math.PI);
    context.stroke();
  }
}
