"use strict";
// Texts enter the page as text nodes only.
const at = (id) => document.getElementById(id);
const { rankings, filters, queries } = JSON.parse(at("data").textContent);
const titles = Object.fromEntries(rankings);

const made = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};

const option = (value, text) => {
  const node = made("option", text);
  node.value = value;
  return node;
};

// A rule puts a candidate below all that have a number; what is unknown is below even these, and has no rank.
const value = (candidate, name) => {
  if (name === "llm" && candidate.rule) return -Infinity;
  const found = candidate.values[name];
  return found === undefined ? null : found;
};

const rank = (candidates, candidate, name) => {
  const own = value(candidate, name);
  if (own === null) return null;
  return 1 + candidates.filter((other) => value(other, name) !== null && value(other, name) > own).length;
};

const ordered = (candidates, name) => {
  const places = candidates.map((candidate, place) => [rank(candidates, candidate, name), place, candidate]);
  places.sort((one, other) => (one[0] ?? Infinity) - (other[0] ?? Infinity) || one[1] - other[1]);
  return places.map((entry) => entry[2]);
};

const shownValue = (candidate, name) => {
  if (name === "llm" && candidate.rule) return candidate.rule.replaceAll("_", " ");
  const found = value(candidate, name);
  if (found === null) return name === "label" ? "no label" : "unknown";
  return String(Math.round(found * 1000) / 1000);
};

let visible = [];
let current = 0;

const chosenFlags = () => [...at("flags").querySelectorAll("input:checked")].map((box) => box.value);

const matches = (query) => {
  const words = at("words").value.trim().toLowerCase();
  const texts = () => [query.id, query.query, ...query.targets, ...query.candidates.map((candidate) => candidate.text)];
  return (
    (!at("task").value || query.task === at("task").value) &&
    chosenFlags().every((name) => query.flags.includes(name)) &&
    (!words || texts().some((text) => text.toLowerCase().includes(words)))
  );
};

const showCandidate = (candidates, candidate) => {
  const node = made("article", undefined, "candidate");
  const ranks = made("dl", undefined, "ranks");
  for (const [name, title] of rankings) {
    const cell = made("div", undefined, name === at("by").value ? "by" : "");
    const place = rank(candidates, candidate, name);
    cell.append(made("dt", title), made("dd", `${place === null ? "–" : `#${place}`} (${shownValue(candidate, name)})`));
    ranks.append(cell);
  }
  const facts = made("div");
  facts.append(made("span", candidate.source, "tag"), made("span", `${candidate.chars} characters`, "tag"));
  for (const name of candidate.suspicious) facts.append(made("span", `talks to the judge: ${name}`, "tag bad"));
  facts.append(made("code", candidate.id, "soft"));
  node.append(ranks, facts, made("div", candidate.text, "text"));
  return node;
};

const show = () => {
  at("candidates").replaceChildren();
  at("query").replaceChildren();
  at("query").hidden = !visible.length;
  at("count").textContent = visible.length ? `${current + 1} of ${visible.length} queries` : "No query matches.";
  at("previous").disabled = current === 0;
  at("next").disabled = current >= visible.length - 1;
  if (!visible.length) return;
  const query = visible[current];
  at("which").value = String(current);
  const head = made("div");
  head.append(made("span", query.task, "tag"), made("span", query.dataset, "tag"), made("code", query.id, "soft"));
  at("query").append(head, made("h3", query.query, "text"));
  for (const target of query.targets) at("query").append(made("div", `Desired output: ${target}`, "text"));
  const flags = made("div");
  for (const name of query.flags) flags.append(made("span", filters[name], "tag bad"));
  const taus = rankings.filter(([name]) => query.tau[name] !== undefined);
  const told = taus.map(([name, title]) => `${title} ${query.tau[name].toFixed(2)}`).join(", ");
  at("query").append(flags, made("div", told ? `tau-b with the LLM: ${told}` : "No tau-b with the LLM.", "soft"));
  for (const candidate of ordered(query.candidates, at("by").value)) {
    at("candidates").append(showCandidate(query.candidates, candidate));
  }
};

const choose = () => {
  visible = queries.filter(matches);
  current = 0;
  const label = (query) => (query.query.length > 60 ? `${query.query.slice(0, 60)}…` : query.query);
  at("which").replaceChildren(...visible.map((query, place) => option(String(place), `${place + 1}: ${label(query)}`)));
  show();
};

const step = (by) => {
  const next = Math.min(Math.max(0, current + by), visible.length - 1);
  if (next !== current && visible.length) {
    current = next;
    show();
  }
};

for (const task of [...new Set(queries.map((query) => query.task))].sort()) at("task").append(option(task, task));
for (const [name, title] of rankings) at("by").append(option(name, title));
for (const [name, title] of Object.entries(filters)) {
  const number = queries.filter((query) => query.flags.includes(name)).length;
  const known = name.replace("against_", "");
  if (name.startsWith("against_") && !titles[known]) continue;
  const box = made("input");
  box.type = "checkbox";
  box.value = name;
  const label = made("label");
  label.append(box, made("span", `${title} (${number})`));
  at("flags").append(label);
}
at("controls").addEventListener("input", choose);
at("controls").addEventListener("submit", (event) => event.preventDefault());
at("previous").addEventListener("click", () => step(-1));
at("next").addEventListener("click", () => step(1));
at("which").addEventListener("input", () => {
  current = Number(at("which").value);
  show();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "j" || event.key === "ArrowRight") step(1);
  if (event.key === "k" || event.key === "ArrowLeft") step(-1);
});
for (const id of ["controls", "steps", "keys"]) at(id).hidden = !queries.length;
choose();
