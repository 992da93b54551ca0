// The smaller plots: spectrum, classes, chains.

const CHAIN_DASHES = ["solid", "dot", "dash", "longdash", "dashdot"];

function drawSpectrum() {
  const { values, share } = DATA.spectrum;
  const rank = values.map((_, i) => i + 1);
  const bars = { type: "scatter", mode: "lines+markers", x: rank, y: values, name: "eigenvalue",
    line: { color: css("accent") }, hovertemplate: "eigenvalue %{x}: %{y:.3g} nats\u00b2<extra></extra>" };
  const sum = { type: "scatter", mode: "lines", x: rank, y: share, yaxis: "y2", name: "share of the total, summed",
    line: { color: css("muted"), dash: "dot" }, hovertemplate: "first %{x}: %{y:.1%} of the total<extra></extra>" };
  return Plotly.newPlot("spectrum-plot", [bars, sum], layout({
    showlegend: true, legend: { orientation: "h", y: 1.14, x: 0 }, margin: { l: 64, r: 56, t: 30, b: 44 },
    xaxis: { title: title("rank of the eigenvalue") },
    yaxis: { title: title("eigenvalue, nats\u00b2"), type: "log", ...logTicks(values) },
    yaxis2: { title: title("share of the trace"), overlaying: "y", side: "right", range: [0, 1.02], tickformat: ".0%",
      tickmode: "array", tickvals: [0, 0.25, 0.5, 0.75, 1], showgrid: false, automargin: true },
  }), CONFIG);
}

/** Ticks of a logarithmic axis: at powers of ten over many decades, at 1, 2, 5 over a few, at all digits within one. */
function logTicks(values) {
  const shown = values.filter((value) => value > 0);
  const decades = Math.log10(Math.max(...shown) / Math.min(...shown));
  if (decades > 3) return { dtick: 1, exponentformat: "power" };
  return { dtick: decades > 0.8 ? "D2" : "D1", tickformat: ".3~g" };
}

function drawDendrogram() {
  const { segments, names, distance } = DATA.classes.dendrogram;
  const lines = segments.map(({ x, y }) => ({ type: "scatter", mode: "lines", x, y, hoverinfo: "skip",
    line: { color: css("accent"), width: 1.6 } }));
  const ticks = names.length <= 60
    ? { tickmode: "array", tickvals: names.map((_, i) => 10 * i + 5), ticktext: names.map(plain) } : { showticklabels: false };
  return Plotly.newPlot("dendrogram-plot", lines, layout({
    hovermode: false, margin: { l: 8, r: 12, t: 8, b: 44 },
    xaxis: { title: title(distance), range: heightRange(segments), zeroline: false },
    yaxis: { ...ticks, side: "right", range: [10 * names.length, 0], showgrid: false, zeroline: false },
  }), CONFIG);
}

/** From the highest join to a little beneath the lowest: classes that differ little are told apart, too. */
function heightRange(segments) {
  const heights = segments.flatMap(({ x }) => x).filter((height) => height > 0);
  const high = Math.max(...heights), low = Math.min(...heights);
  const span = Math.max(high - low, 0.02 * high);
  return [high + 0.05 * span, Math.max(low - 0.25 * span, 0)];
}

function drawClassMeans() {
  const { means, names, image_error: images, chain_error: chains } = DATA.classes;
  const error = (a, b) => [[images, "images"], [chains, "chains"]].filter(([given]) => given && given[a][b] !== null)
    .map(([given, name]) => ` \u00b1 ${given[a][b].toFixed(3)} (${name})`).join("");
  const few = names.length <= 14;
  const limit = Math.max(...means.flat().map((value) => Math.abs(value ?? 0)), 1e-9);
  const shown = names.map(plain);
  const heat = {
    type: "heatmap", z: means, zmin: -limit, zmax: limit, colorscale: diverging(), xgap: few ? 1 : 0, ygap: few ? 1 : 0,
    texttemplate: few ? "%{z:.2f}" : "", textfont: { size: 11 },
    customdata: names.map((a, i) => names.map((b, j) => [`${plain(a)} and ${plain(b)}`, error(i, j)])),
    hovertemplate: "%{customdata[0]}<br>mean R = %{z:.3f}%{customdata[1]}<extra></extra>",
    colorbar: { thickness: 12, len: 0.9, outlinewidth: 0, title: { text: "mean R (no unit)", side: "right" } },
  };
  const at = names.map((_, i) => i);
  const axis = names.length <= 60 ? { tickmode: "array", tickvals: at, ticktext: shown } : { showticklabels: false };
  return Plotly.newPlot("classes-plot", [heat], layout({
    margin: { l: 8, r: 8, t: 8, b: 8 },
    xaxis: { ...axis, tickangle: -40, showgrid: false, zeroline: false },
    yaxis: { ...axis, autorange: "reversed", showgrid: false, zeroline: false },
  }), CONFIG);
}

function drawChains(id, chains, unit) {
  const colors = groupColors(Math.min(chains.length, 20));
  const every = DATA.traces.every;
  const lines = chains.map((values, chain) => ({
    type: "scatter", mode: "lines", name: `chain ${chain}`, x: values.map((_, i) => i * every), y: values,
    line: { width: 1.2, color: colors[chain % colors.length], dash: CHAIN_DASHES[Math.floor(chain / 20) % 5] },
  }));
  return Plotly.newPlot(id, lines, layout({
    showlegend: chains.length <= 8, legend: { orientation: "h", y: 1.16, x: 0 }, margin: { l: 64, r: 12, t: 30, b: 44 },
    xaxis: { title: title("draw of the chain") }, yaxis: { title: title(unit) }, hovermode: "closest",
  }), CONFIG);
}

async function drawCharts() {
  if (DATA.spectrum) await drawSpectrum();
  if (DATA.classes) {
    await drawDendrogram();
    await drawClassMeans();
  }
  if (DATA.traces.mean_loss) await drawChains("loss-plot", DATA.traces.mean_loss, "mean loss of the probe, nats");
  if (DATA.traces.excess) await drawChains("excess-plot", DATA.traces.excess, "training loss above its value at w*, nats");
}
