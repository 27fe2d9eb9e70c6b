// Searching the book: how its sections are indexed when the site is built, and what a query finds.
import MiniSearch from "./vendor/minisearch.mjs";

// Words are told apart without their endings, so that "merge" finds "merging".
const SMALL = new Set("a an and are as at by do does for from how i in is it my of on or the to what when which with".split(" "));
const ENDING = /(?:e?ing|ed|es|s|e)$/;
const stem = (term) => {
  const word = term.toLowerCase();
  if (SMALL.has(word)) return null;
  const bare = word.length > 4 ? word.replace(ENDING, "") : word;
  return bare.replace(/(.)\1$/, "$1"); // forgett, of forgetting
};
const OPTIONS = { fields: ["page", "title", "also", "text"], storeFields: ["page", "title", "text", "weight"], processTerm: stem };

// Pages to look things up in stand behind chapters, and behind both what is only listed.
const WEIGHTS = [[/^\/(?:api|choices-|architecture|whats-new|literature)/, 0.3], [/^\/a4-/, 0.4], [/^\/(?:glossary|manual|where-it-runs)/, 0.6], [/^\/a\d-/, 0.8]];
const weightOf = (url) => WEIGHTS.find(([pages]) => pages.test(url))?.[1] ?? 1;

// The index of MyST's records, as JSON: a document for each section, under its address. `keywords` has, by
// page, further words that lead to it.
export function indexOf(records, keywords) {
  const sections = new Map();
  for (const { hierarchy, content = "", url } of records) {
    const titles = Object.keys(hierarchy).sort().map((level) => hierarchy[level]).filter(Boolean);
    const section = sections.get(url) ?? { id: url, page: titles[0], title: titles.slice(1).join(" › "), text: "", weight: weightOf(url) };
    section.text = `${section.text} ${content}`.replace(/\s+/g, " ").trim();
    section.also = url.includes("#") ? "" : (keywords[url.slice(1)] ?? []).join(" ");
    sections.set(url, section);
  }
  const index = new MiniSearch(OPTIONS);
  index.addAll([...sections.values()]);
  return JSON.stringify(index);
}

export const read = (text) => MiniSearch.loadJSON(text, OPTIONS);

// The pages that a query finds, each with its best section: {url, page, title, excerpt}, where `excerpt` is
// a list of [text, whether it was found].
const MOST = 10;
const FUZZY = [0.2, 0.34]; // letters that may be wrong, as a share of a word's; the second where nothing is found
const OTHERS = 0.15; // what a further section adds to its page's score, as a part of its own
export function find(index, query) {
  const how = {
    boost: { page: 4, also: 6, title: 2 },
    prefix: (term) => term.length > 2,
    weights: { fuzzy: 0.3, prefix: 0.5 },
    boostDocument: (id, term, { weight }) => weight,
  };
  const search = (share, combineWith) =>
    index.search(query, { ...how, combineWith, fuzzy: (term) => (term.length > 4 ? share : false) });
  const ways = [[FUZZY[0], "AND"], [FUZZY[0], "OR"], [FUZZY[1], "AND"]];
  const found = ways.reduce((hits, way) => (hits.length ? hits : search(...way)), []);
  const pages = new Map();
  for (const hit of found) {
    const page = pages.get(hit.page) ?? { best: hit, score: hit.score * (1 - OTHERS) };
    page.score += hit.score * OTHERS;
    if (!page.titled && Object.values(hit.match).flat().includes("title")) page.titled = hit; // where to land
    pages.set(hit.page, page);
  }
  return [...pages.values()]
    .sort((one, other) => other.score - one.score)
    .slice(0, MOST)
    .map(({ best, titled = best }) => titled)
    .map((best) => ({ url: best.id, page: best.page, title: best.title, excerpt: excerpt(best.text, best.terms) }));
}

const LENGTH = 130; // characters
function excerpt(text, terms) {
  const begins = new RegExp(`(?<![\\p{L}\\p{N}])((?:${terms.map((term) => term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})[\\p{L}]*)`, "iu");
  const at = Math.max(0, text.search(begins) - 40);
  const cut = text.slice(at, at + LENGTH);
  const parts = cut.split(begins).map((part, n) => [part, n % 2 === 1]);
  return [...(at ? [["…", false]] : []), ...parts, ...(at + LENGTH < text.length ? [["…", false]] : [])];
}
