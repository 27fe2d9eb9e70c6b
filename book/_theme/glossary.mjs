// A plugin of MyST: on every page, the first use of each term of book/glossary.md links to its
// definition. It works on the page's tree, so any theme shows the links.
import fs from "node:fs";

const GLOSSARY = new URL("../glossary.md", import.meta.url);
// Where a term stays as it is: it would be a link in a link, or is no running text.
const LEFT = new Set([
  "admonitionTitle",
  "captionNumber",
  "cite",
  "citeGroup",
  "code",
  "crossReference",
  "glossary",
  "heading",
  "html",
  "inlineCode",
  "inlineMath",
  "link",
  "linkBlock",
  "math",
  "outputs",
  "summary",
]);

// A line right before one that begins with a colon is a term; what follows is its definition.
function terms() {
  const lines = fs.readFileSync(GLOSSARY, "utf-8").split("\n");
  return lines.filter((line, n) => lines[n + 1]?.startsWith(": ") && !line.startsWith(":"));
}

// The definition of each term in plain words, by its identifier.
export function definitions() {
  const text = fs.readFileSync(GLOSSARY, "utf-8");
  const found = terms().map((term) => {
    const begin = text.indexOf(`\n${term}\n: `) + term.length + 4;
    const [words] = text.slice(begin).split(/\n\s*\n|\n:::/);
    const plain = words
      .replace(/\s*\{cite:[pt]\}`[^`]*`/g, "")
      .replace(/\{[\w:]+\}`([^`<]*)(?:<[^>]*>)?`/g, "$1")
      .replace(/\[([^\]]*)\]\([^)]*\)/g, "$1")
      .replace(/[`*$\\]/g, "");
    return [identifierOf(term), plain.replace(/\s+/g, " ").trim()];
  });
  return Object.fromEntries(found);
}

const identifierOf = (term) => `term-${term.toLowerCase()}`;

// Words that are written with capitals inside (EMA, TIES, SI) are found as they are written, others
// also in lower case; all also with an s.
function pattern(term) {
  const capitals = /[A-Z]/.test(term.slice(1));
  const text = term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/[ -]/g, "[\\s-]");
  return new RegExp(`(?<![\\p{L}\\p{N}_-])${text}s?(?![\\p{L}\\p{N}_-])`, capitals ? "u" : "iu");
}

const FINDERS = terms()
  .sort((one, other) => other.length - one.length)
  .map((term) => ({ identifier: identifierOf(term), finds: pattern(term) }));

// The earliest term in a text, the longest of those that begin there.
function earliest(text) {
  let best;
  for (const finder of FINDERS) {
    const match = finder.finds.exec(text);
    if (match && (!best || match.index < best.match.index)) best = { finder, match };
  }
  return best;
}

function linked(text, left) {
  const found = earliest(text);
  if (!found) return [{ type: "text", value: text }];
  const { finder, match } = found;
  const [before, word] = [text.slice(0, match.index), match[0]];
  const after = text.slice(match.index + word.length);
  const isFirst = left.delete(finder);
  const rest = after ? linked(after, left) : [];
  // in a later use of "task vector", the word "task" is no use of "task"
  if (!isFirst) return [{ type: "text", value: before + word }, ...rest];
  const link = {
    type: "crossReference",
    identifier: finder.identifier,
    label: finder.identifier,
    kind: "definitionTerm",
    children: [{ type: "text", value: word }],
  };
  return [...(before ? [{ type: "text", value: before }] : []), link, ...rest];
}

function walk(node, left) {
  if (!node.children || LEFT.has(node.type)) return;
  node.children = node.children.flatMap((each) => {
    if (each.type === "text") return linked(each.value, left);
    walk(each, left);
    return [each];
  });
}

export default {
  name: "First uses of the glossary's terms",
  transforms: [
    {
      name: "glossary-first-uses",
      stage: "document",
      plugin: () => (tree, file) => {
        if (!/glossary\.md$/.test(file.path ?? "")) walk(tree, new Set(FINDERS));
      },
    },
  ],
};
