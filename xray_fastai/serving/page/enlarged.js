// The enlarged view of one answer, where the window of a DICOM file can be changed.

import { byId, reason, shown, significant } from "./facts.js";
import { predict } from "./requests.js";
import { kindOf, pictures, score } from "./results.js";

let job = null; // the one that is shown
let changed = () => {}; // called with the job after another window gave another answer
let request = new AbortController(); // the next change of the window aborts it

export function enlarge(one, whenChanged) {
  job = one;
  changed = whenChanged;
  byId("window-status").textContent = "";
  fill();
  byId("large").showModal();
}

function fill() {
  const { file, result } = job;
  byId("large-title").textContent = `${file.name}: ${result.error ? "not read" : result.prediction}`;
  byId("large").className = `${result.error ? "" : kindOf(result)} ${result.window ? "with-window" : ""}`;
  byId("large").querySelector(".pictures").replaceChildren(...(result.error ? [] : pictures(job)));
  byId("large-score").replaceChildren(result.error ? reason(job) : score(result));
  byId("window").hidden = !result.window;
  if (result.window) fillWindow(result.window);
}

function fillWindow({ centre, width, low, high }) {
  const range = high - low;
  const step = range >= 100 ? 1 : Number((range / 1000).toPrecision(1)); // Hounsfield units, stored values: whole numbers
  for (const [name, value, least, most] of [
    ["centre", centre ?? (low + high) / 2, low, high],
    ["width", width ?? range, step, range],
  ]) {
    const slider = byId(`${name}-slider`);
    [slider.min, slider.max, slider.step] = [least, most, step];
    slider.value = value;
    byId(name).value = tidy(value);
  }
  byId("window-hint").textContent =
    `In the file's own units: a centre from ${tidy(low)} to ${tidy(high)}, a width up to ${tidy(range)}.` +
    (centre === null ? " A VOI LUT of the file shows the values now." : "");
}

const tidy = (number) => String(Number(number.toFixed(6)));

// Predicts the file again; the answer takes the place of the one before, unless the file cannot be read by this window.
async function setWindow(chosen) {
  request.abort();
  request = new AbortController();
  const { signal } = request;
  const own = job;
  byId("window-status").textContent = "Predicting …";
  const result = await predict(own.file, signal, chosen);
  if (signal.aborted) return;
  if (!result.error) {
    own.result = result;
    own.chosen = chosen;
    changed(own);
    fill();
  }
  const outcome = result.error ? reason({ file: own.file, result }) : outcomeOf(result);
  byId("window-status").textContent = outcome;
}

export function outcomeOf(result) {
  if (result.uncertain) return `uncertain, ${result.uncertain}`;
  return `${result.prediction}, probability ${shown(result.probabilities[result.prediction])}`;
}

for (const name of ["centre", "width"]) {
  const [number, slider] = [byId(name), byId(`${name}-slider`)];
  slider.addEventListener("input", () => {
    number.value = tidy(Number(slider.value));
  });
  for (const input of [number, slider]) {
    input.addEventListener("change", () => {
      if (input === number) slider.value = number.value;
      setWindow([byId("centre").value, byId("width").value].map(tidyText));
    });
  }
}
const tidyText = (text) => tidy(Number(text));
byId("as-in-file").addEventListener("click", () => setWindow(null));
byId("close").addEventListener("click", () => byId("large").close());
byId("large").addEventListener("click", (event) => {
  if (event.target === byId("large")) byId("large").close();
});
byId("large").addEventListener("close", () => {
  request.abort();
  job.card?.querySelector("button")?.focus(); // a change of the window has made the button anew
});
