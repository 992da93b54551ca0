// The page: what is selected, what the keys and buttons do, and drawing everything, again when the scheme changes.

const NUMBER = document.getElementById("sample-number");
const WRONG = document.getElementById("sample-wrong");
let selected = null;

function select(sample) {
  selected = sample;
  NUMBER.value = sample;
  WRONG.textContent = "";
  showDetails(sample);
  markOnMap(sample);
  markOnMatrix(sample);
}

function selectTyped() {
  const sample = Number(NUMBER.value);
  if (NUMBER.value.trim() !== "" && Number.isInteger(sample) && sample >= 0 && sample < N) select(sample);
  else WRONG.textContent = `a whole number from 0 to ${N - 1}`;
}

function listen() {
  NUMBER.addEventListener("change", selectTyped);
  NUMBER.addEventListener("keydown", (event) => event.key === "Enter" && selectTyped());
  COLOR.addEventListener("change", recolorMap);
  MAP.addEventListener("keydown", mapKey);
  MAP.addEventListener("mouseleave", hideCard);
  const press = {
    "map-in": () => zoomMap(0.7), "map-out": () => zoomMap(1 / 0.7), "map-home": resetMap,
    "matrix-in": () => zoomMatrix(0.6), "matrix-out": () => zoomMatrix(1 / 0.6), "matrix-home": matrixHome,
    copy: copyConfig,
  };
  for (const [id, action] of Object.entries(press)) document.getElementById(id)?.addEventListener("click", action);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-sample]");
    if (!link) return;
    if (DETAILS.contains(link)) event.preventDefault(); // the map is in view already
    select(Number(link.dataset.sample));
  });
  document.querySelectorAll("ol.cards").forEach((list) => list.addEventListener("keydown", moveInList));
  DARK.addEventListener("change", drawAll);
}

/** Arrow keys go through a list of samples; Enter, as on any link, selects one. */
function moveInList(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const links = [...event.currentTarget.querySelectorAll("a")];
  const next = links[links.indexOf(document.activeElement) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

async function copyConfig() {
  const said = document.getElementById("copied");
  const text = document.getElementById("config").textContent;
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(document.getElementById("config"));
    said.textContent = "selected: copy it with the keyboard";
  }
}

async function drawAll() {
  await drawMap();
  await drawMatrix();
  if (selected !== null) select(selected);
  await drawCharts();
  document.documentElement.dataset.ready = String(Number(document.documentElement.dataset.ready || 0) + 1);
}

function start() {
  for (const name of Object.keys(COLORINGS)) COLOR.append(element("option", { value: name, text: name }));
  NUMBER.max = N - 1;
  listen();
  listenToMatrix();
  drawAll().then(() => DATA.first !== null && select(DATA.first));
}

start();
