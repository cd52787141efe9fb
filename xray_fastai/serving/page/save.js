// Saves the results: the table as CSV, the answers as JSON, and the page as one file that needs no server.

import { byId, columns, countOf, disclaimer, facts, formula, make } from "./facts.js";
import { fillCard, fillRow } from "./results.js";

const NO_PICTURES = { image: null, heatmap: null, positive_heatmap: null, note: null, seen: null };
const POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";

function download(name, type, parts) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob(parts, { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A spreadsheet runs some text as a formula; an apostrophe prevents it, as in the table that `predict` writes.
const guarded = (text) => (formula.test(text) ? `'${text}` : text);

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = guarded(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// The columns of `predict`; where a window was chosen here, two more say which.
export function saveTable(jobs) {
  const names = columns.map((column) => column.name);
  const windows = jobs.some((job) => job.chosen);
  const rows = jobs.map(({ result, chosen }) => [
    ...names.map((name) => result.row[name]),
    ...(windows ? (chosen ?? [null, null]) : []),
  ]);
  const lines = [[...names, ...(windows ? ["window_centre", "window_width"] : [])], ...rows];
  download("predictions.csv", "text/csv", lines.map((line) => `${line.map(csvCell).join(",")}\n`));
}

// As POST /predict?heatmap=false answers.
export function saveJson(jobs) {
  const predictions = jobs.map(({ result }) => ({ ...result, ...NO_PICTURES }));
  const text = JSON.stringify({ predictions, model: facts, disclaimer }, null, 1);
  download("predictions.json", "application/json", [text]);
}

export function savePage(jobs) {
  const page = document.documentElement.cloneNode(true);
  for (const element of page.querySelectorAll("script, link, noscript, dialog, nav, #drop, #kept, .actions, .skip, .api")) {
    element.remove();
  }
  const { dataset } = page.querySelector("body");
  for (const name of Object.keys(dataset)) delete dataset[name];
  const policy = make("meta");
  policy.httpEquiv = "Content-Security-Policy";
  policy.content = POLICY;
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
  page.querySelector("head").append(policy, make("style", "", rules.map((rule) => rule.cssText).join("\n")));
  const when = new Date().toLocaleString("en-GB");
  page.querySelector("header").append(make("p", "", `${countOf(jobs.length, "file")}, saved on ${when}.`));
  page.querySelector("#rows").replaceChildren(...jobs.map((job) => filled({ ...job, row: make("tr") }, fillRow).row));
  page.querySelector("#cards").replaceChildren();
  const [before, after] = page.outerHTML.split('<ol id="cards"></ol>'); // one text of all pictures may be too long
  const cards = jobs.map((job) => asText(filled({ ...job, card: make("li", "card") }, fillCard).card));
  download("predictions.html", "text/html", ["<!doctype html>\n", before, '<ol id="cards">', ...cards, "</ol>", after]);
}

function filled(job, fill) {
  fill(job);
  return job;
}

function asText(card) {
  const button = card.querySelector("button");
  button?.querySelector(".enlarge")?.remove();
  button?.replaceWith(...(button.matches(".pictures") ? [make("div", "pictures", ...button.childNodes)] : []));
  return card.outerHTML;
}
