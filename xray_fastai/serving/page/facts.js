// What the server wrote into the page, and how numbers and elements are made of it.
// Text from outside is only ever set as text (textContent), never parsed as HTML.

const { dataset } = document.body;

export const facts = JSON.parse(dataset.model); // the API's ModelFacts
export const columns = JSON.parse(dataset.columns); // [{name, isNumber}], as the server names them in a row
export const maxFile = Number(dataset.maxFile); // bytes
export const formula = new RegExp(dataset.formula); // text that a spreadsheet would run
export const disclaimer = dataset.disclaimer;

export const byId = (id) => document.getElementById(id);

export function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

export const countOf = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
// never 1.000 or 0.000: no probability is known that precisely
export const shown = (p) => (p > 0.9995 ? "> 0.999" : p < 0.0005 ? tiny(p) : p.toFixed(3));
// of a small prevalence all probabilities, and the threshold, are small
const tiny = (p) => (facts.prevalence ? p.toPrecision(3) : "< 0.001");
export const significant = (number) => String(Number(number.toPrecision(4)));

export const reason = ({ file, result }) => {
  const text = result.error.slice(`${file.name}: `.length);
  return text.charAt(0).toUpperCase() + text.slice(1);
};
