// The page's data, as lossk.report.payload packs them, and small things made from them.

const DATA = JSON.parse(document.getElementById("lossk-data").textContent);
const ARRAYS = {
  float32: Float32Array, int32: Int32Array, int16: Int16Array, uint16: Uint16Array, int8: Int8Array, uint8: Uint8Array,
};

/** A packed array as a typed array; what is absent stays null. */
function decode(packed) {
  if (!packed) return null;
  const text = atob(packed.base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[packed.dtype](bytes.buffer);
}

const N = DATA.num_samples;
const SAMPLE = Object.fromEntries(Object.entries(DATA.samples).map(([name, packed]) => [name, decode(packed)]));
const NEIGHBORS = Object.fromEntries(
  Object.entries(DATA.neighbors).map(([kind, found]) => [kind, found && {
    k: found.k,
    index: decode(found.index),
    correlation: decode(found.correlation),
    error: decode(found.error),
    significant: decode(found.significant),
  }]),
);
const SCALE = 32767; // of correlations and their errors, kept as 16-bit integers

function className(label) {
  return label >= 0 && label < DATA.class_names.length ? DATA.class_names[label] : String(label);
}

/** A number of any size with three or four significant digits. */
function format(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
  return size < 1 ? minus(value.toPrecision(3)) : minus(value.toFixed(size >= 100 ? 1 : 3));
}

/** A correlation or its error. */
function fixed(value) {
  return minus(value.toFixed(2));
}

function minus(text) {
  return text.replace("-", "\u2212");
}

/** Plotly reads some HTML in the texts it draws; a store's strings are shown as they are. */
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** An element: attributes by name ("text" is its text), then children. Strings never become markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// -- images: a few sheets of thumbnails, each decoded when it is first needed

const SHEETS = new Map();

function sheet(number) {
  if (!SHEETS.has(number)) {
    const image = new Image();
    image.src = DATA.images.sheets[number];
    SHEETS.set(number, image.decode().then(() => image));
  }
  return SHEETS.get(number);
}

const SLOT = DATA.images && decode(DATA.images.slot);

function hasImage(sample) {
  return SLOT !== null && SLOT[sample] >= 0;
}

/** A canvas with a sample's image, `side` CSS pixels along its longer side; null where it has none. */
function thumbnail(sample, side) {
  if (!hasImage(sample)) return null;
  const { width, height, columns, per_sheet } = DATA.images;
  const canvas = element("canvas", { width, height, role: "img", "aria-label": `image of ${DATA.unit} ${sample}` });
  const scale = side / Math.max(width, height);
  canvas.style.width = `${Math.round(width * scale)}px`;
  canvas.style.height = `${Math.round(height * scale)}px`;
  const within = SLOT[sample] % per_sheet;
  const x = (within % columns) * width;
  const y = Math.floor(within / columns) * height;
  sheet(Math.floor(SLOT[sample] / per_sheet)).then((image) => {
    canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
    canvas.dataset.drawn = "";
  });
  return canvas;
}

function textOf(sample) {
  if (DATA.texts) return DATA.texts[sample];
  if (SAMPLE.tokens) return `sample ${SAMPLE.tokens[2 * sample]}, position ${SAMPLE.tokens[2 * sample + 1]}`;
  return null;
}

/** Label, prediction and whether it was trained on, in a few words; "" where nothing is known. */
function describe(sample) {
  const words = [];
  if (SAMPLE.label) words.push(className(SAMPLE.label[sample]));
  if (SAMPLE.prediction) {
    const right = SAMPLE.label && SAMPLE.prediction[sample] === SAMPLE.label[sample];
    words.push(right ? "predicted rightly" : `predicted ${className(SAMPLE.prediction[sample])}`);
  }
  if (SAMPLE.held_out) words.push(SAMPLE.held_out[sample] ? "held out" : "trained on");
  return words.join(" \u00b7 ");
}
