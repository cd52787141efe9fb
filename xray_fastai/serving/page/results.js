// Shows one answer: as a card, as a row of the table, and the parts that the enlarged view shows, too.

import { columns, facts, make, reason, shown, significant } from "./facts.js";

const isUnlike = (result) => facts.limit !== null && result.unlike !== null && result.unlike > facts.limit;
export const kindOf = (result) =>
  result.uncertain ? "uncertain" : result.prediction === facts.positive ? "positive" : "";

function heading(name, text, kind) {
  return make("div", "head", make("h3", "", name), make("span", `call ${kind}`, text));
}

// Fills a job's card: it waits, cannot be read, or has an answer. `enlarge` is called by its button.
export function fillCard({ card, file, result, chosen, started }, enlarge) {
  if (!result) {
    card.replaceChildren(heading(file.name, started ? "predicting …" : "waiting", "waiting"));
    return;
  }
  const button = make("button");
  button.type = "button";
  button.addEventListener("click", enlarge);
  card.className = `card ${result.error ? "bad" : kindOf(result)}`;
  if (result.error) {
    card.replaceChildren(heading(file.name, "not read", ""), make("p", "", reason({ file, result })));
    if (!result.window) return;
    button.className = "plain";
    button.textContent = "Change the window";
    card.append(button);
    return;
  }
  button.className = "pictures";
  button.append(...pictures({ file, result, chosen }), make("span", "enlarge", result.window ? "Enlarge, change the window" : "Enlarge"));
  const call = result.uncertain ? "uncertain, not called" : result.prediction;
  card.replaceChildren(heading(file.name, call, kindOf(result)), button, score(result));
}

function picture(source, alt, caption, className = "") {
  const frame = make("span", `frame ${className}`);
  if (source) {
    const image = make("img");
    image.decoding = "async";
    image.src = source;
    image.alt = alt;
    frame.append(image);
  } else {
    frame.classList.add("empty");
    frame.textContent = alt;
  }
  return make("span", "picture", frame, make("span", "caption", caption));
}

export function windowText({ window }, chosen) {
  if (window.centre === null) return "by the file's VOI LUT";
  return `window ${significant(window.centre)} / ${significant(window.width)}${chosen ? ", chosen here" : ""}`;
}

export function pictures({ file, result, chosen }) {
  const { positive, size } = facts;
  const mapped = isUnlike(result) ? null : result.uncertain ? positive : result.prediction;
  const shownPictures = [
    picture(result.image, `X-ray ${file.name}`, result.window ? `As read, ${windowText(result, chosen)}` : "As read"),
    picture(result.seen, `What the network sees of ${file.name}`, `What the network sees: ${size} × ${size}`, "seen"),
    heatMap(file, result.heatmap, mapped, result.note),
  ];
  if (mapped && positive && mapped !== positive) {
    const none = `No heat map: no region of the image supports ${positive}`;
    shownPictures.push(heatMap(file, result.positive_heatmap, positive, none));
  }
  return shownPictures;
}

function heatMap(file, source, name, note) {
  const alt = source ? `Heat map of ${file.name}: the regions that support ${name}` : note;
  return picture(source, alt, name ? `What speaks for ${name}` : "Heat map");
}

function why(result) {
  const mark = result.threshold === null ? "" : `the threshold of ${significant(result.threshold)} (the mark)`;
  if (isUnlike(result)) {
    return [
      make("strong", "", "Not called: unlike the training images."),
      ` ${significant(result.unlike)} % of them are more like the others than this image is; the limit is ` +
        `${significant(facts.limit)} %. The probability is what the network computes of any picture. It says nothing here.`,
    ];
  }
  if (result.uncertain) {
    return [make("strong", "", "Not called: too close to call."), ` The probability is within ${facts.abstain} of ${mark}.`];
  }
  if (!mark) return [`The most probable class is predicted. Probabilities: ${facts.probabilities}.`];
  const side = result.prediction === facts.positive ? "at or above" : "below";
  return [`Predicted ${result.prediction}: ${side} ${mark}. Probability: ${facts.probabilities}.`];
}

export function score(result) {
  const parts = [];
  const hasThreshold = result.threshold !== null;
  for (const name of hasThreshold ? [facts.positive] : facts.classes) {
    const p = result.probabilities[name];
    const fill = make("div", "fill");
    fill.style.width = `${100 * p}%`;
    const track = make("div", "track", fill);
    track.setAttribute("aria-hidden", "true");
    if (hasThreshold) {
      const mark = make("div", "mark");
      mark.style.left = `${100 * result.threshold}%`;
      track.append(mark);
    }
    const label = hasThreshold ? `Probability of ${name}` : name;
    parts.push(make("div", "line", make("span", "", label), make("strong", "", shown(p))), track);
  }
  const words = make("p", "why", ...why(result));
  return make("div", "score", ...(result.uncertain ? [words, ...parts] : [...parts, words]));
}

// The table

export function header() {
  const cells = columns.map(({ name, isNumber }) => {
    const cell = make("th", isNumber ? "n" : "", name === "path" ? "file" : name);
    cell.scope = "col";
    return cell;
  });
  return make("tr", "", ...cells);
}

export function fillRow(job) {
  if (job.result) job.row.replaceChildren(...columns.map((column) => cellOf(job, column)));
}

function cellOf(job, { name, isNumber }) {
  const value = job.result.row[name] ?? "";
  if (name === "path") {
    const cell = make("th", "", value);
    cell.scope = "row";
    return cell;
  }
  if (name === "error") return make("td", "fault", value && reason(job));
  if (name === "prediction" && job.result.uncertain) return make("td", "", `${value}: ${job.result.uncertain}`);
  const digits = (number) => (facts.prevalence ? String(number) : number.toFixed(4));
  return isNumber ? make("td", "n", value === "" ? "" : digits(value)) : make("td", "", String(value));
}
