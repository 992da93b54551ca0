// Colors: of the page, read from its style sheet so that both schemes have them; of classes; of values.

const DARK = window.matchMedia("(prefers-color-scheme: dark)");

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Okabe and Ito's colors and more that keep clear of them; the second row of each is for a dark page.
const CLASS_COLORS = [
  ["#0072b2", "#3f9fe0"], ["#e69f00", "#e69f00"], ["#009e73", "#16b98a"], ["#d55e00", "#e8743b"], ["#cc79a7", "#d98bb8"],
  ["#56b4e9", "#8fd0f7"], ["#8c6d31", "#b3925a"], ["#6a3d9a", "#a57fd6"], ["#3a3a3a", "#e8e8e8"], ["#a6a600", "#c9c93a"],
  ["#a50026", "#e0526f"], ["#1b7837", "#5fbf78"], ["#7f7f7f", "#9a9a9a"], ["#e377c2", "#f2a3dc"], ["#17becf", "#4fdbe8"],
  ["#4d4fb0", "#8385e6"], ["#b15928", "#cf8557"], ["#80b1d3", "#a9cfe8"], ["#66a61e", "#93cf4d"], ["#f4a582", "#f9c3aa"],
];
const VIRIDIS = [
  [0, "#440154"], [0.13, "#482878"], [0.25, "#3e4989"], [0.38, "#31688e"], [0.5, "#26828e"], [0.63, "#1f9e89"],
  [0.75, "#35b779"], [0.88, "#6ece58"], [1, "#fde725"],
];

/** Colors of `count` groups. Past twenty, hues in order: neighbors in the order look alike, as they should. */
function groupColors(count) {
  const dark = DARK.matches ? 1 : 0;
  if (count <= CLASS_COLORS.length) return CLASS_COLORS.slice(0, count).map((pair) => pair[dark]);
  return Array.from({ length: count }, (_, i) => {
    const light = (dark ? 58 : 40) + (i % 2) * 14;
    return `hsl(${Math.round((330 * i) / count)} 65% ${light}%)`;
  });
}

/** A Plotly color scale in which each of the colors is one step. */
function steps(colors) {
  return colors.flatMap((color, i) => [[i / colors.length, color], [(i + 1) / colors.length, color]]);
}

/** Blue for below zero, red for above; the middle is the page's own background. */
function diverging() {
  return DARK.matches
    ? [[0, "#8cc5ff"], [0.25, "#2f6fb5"], [0.5, "#161b22"], [0.75, "#c0453b"], [1, "#ffb59e"]]
    : [[0, "#053061"], [0.25, "#4393c3"], [0.5, "#f7f7f7"], [0.75, "#d6604d"], [1, "#67001f"]];
}

/** [256][3] bytes of a color scale of hexadecimal colors. */
function lookup(scale) {
  const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return Array.from({ length: 256 }, (_, level) => {
    const at = level / 255;
    const right = Math.max(scale.findIndex(([stop]) => stop >= at), 1);
    const [[low, from], [high, to]] = [scale[right - 1], scale[right]];
    const share = (at - low) / (high - low);
    const [a, b] = [parse(from), parse(to)];
    return a.map((value, channel) => Math.round(value + (b[channel] - value) * share));
  });
}

/** What every plot shares: fonts, grid, background, in the page's colors. */
function layout(changes) {
  const axis = { gridcolor: css("line"), zerolinecolor: css("line"), linecolor: css("line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = changes;
  return {
    paper_bgcolor: css("panel"), plot_bgcolor: css("panel"),
    font: { family: css("font"), size: 13, color: css("ink") },
    margin: { l: 56, r: 16, t: 12, b: 44 },
    showlegend: false,
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}

const CONFIG = { displayModeBar: false, responsive: true, doubleClick: "reset" };

function title(text) {
  return { text: plain(text), font: { size: 13 }, standoff: 8 };
}
