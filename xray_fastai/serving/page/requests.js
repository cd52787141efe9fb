// Sends one file to POST /predict, and tries again while the server is busy.

import { columns, facts, maxFile } from "./facts.js";

const MAX_TRIES = 60; // requests for one file while the server is busy
const NO_VALUES = Object.fromEntries(columns.map(({ name }) => [name, null]));
const NO_PREDICTION = {
  prediction: null, uncertain: null, probabilities: null, threshold: facts.threshold, unlike: null,
  image: null, heatmap: null, positive_heatmap: null, note: null, seen: null, window: null,
}; // prettier-ignore

function failed(file, why, answer = {}) {
  const error = `${file.name}: ${why}`;
  return { ...NO_PREDICTION, ...answer, file: file.name, error, row: { ...NO_VALUES, ...answer.row, path: file.name, error } };
}

// Returns the answer for a file, or null where `signal` ended the request. `window`: [centre, width] of a DICOM file.
export async function predict(file, signal, window = null) {
  if (file.size > maxFile) {
    return failed(file, `${Math.ceil(file.size / 1e6)} MB; the maximum is ${Math.floor(maxFile / 1e6)} MB`);
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return failed(file, "cannot be read; is it a folder, or was it moved?");
  }
  const address = window ? `predict?window=${window.join(",")}` : "predict";
  for (let tries = 0; tries < MAX_TRIES; tries += 1) {
    const form = new FormData();
    form.append("file", file, file.name);
    try {
      const response = await fetch(address, { method: "POST", body: form, signal });
      const wait = Number(response.headers.get("Retry-After"));
      if (response.status === 503) {
        await new Promise((resolve) => setTimeout(resolve, 1000 * (wait || 1)));
        continue;
      }
      const answer = await response.json();
      if (!answer.predictions) return failed(file, answer.error);
      if (JSON.stringify(answer.model) !== JSON.stringify(facts)) {
        return failed(file, "the server was restarted with another model; save these results, then reload the page");
      }
      const [result] = answer.predictions;
      if (result.error) return failed(file, result.error.replace(`${result.file}: `, ""), result);
      return { ...result, file: file.name, row: { ...result.row, path: file.name } }; // the form changes " to %22
    } catch {
      if (signal.aborted) return null;
      return failed(file, "no answer from the server; is it still running?");
    }
  }
  return failed(file, "the server is busy; try again later");
}
