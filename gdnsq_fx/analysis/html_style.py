"""Style sheet and script of the HTML report."""

from __future__ import annotations

STYLE = """
:root { --ink: #212529; --soft: #5f6b77; --rule: #e9ecef; --warm: #fff4e6; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 2.5rem 2rem 4rem; color: var(--ink);
       background: #fff; font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
       sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1.5rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .35rem; }
p.note { color: var(--soft); margin: 0 0 .9rem; max-width: 62rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(14rem,
         1fr)); }
.card { border: 1px solid var(--rule); border-radius: .5rem; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; }
.card span { color: var(--soft); font-size: .85rem; display: block;
             overflow-wrap: anywhere; }
.figure { border: 1px solid var(--rule); border-radius: .5rem; padding: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
        font-size: .87rem; }
th { position: sticky; top: 0; background: #fff; color: var(--soft); font-weight: 600;
     border-bottom: 2px solid var(--rule); vertical-align: bottom; padding: 0; }
th button { all: unset; cursor: pointer; padding: .45rem .6rem; display: block; }
th button:focus-visible { outline: 2px solid #1864ab; }
th button::after { content: " \\2195"; color: #ced4da; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td, th { text-align: right; }
td.text, th.text { text-align: left; }
tr.bottleneck td { background: var(--warm); }
tbody tr:hover td { background: #f1f3f5; }
.bar { display: inline-block; width: 6rem; height: .6rem; margin-left: .6rem;
       background: #f1f3f5; border-radius: .3rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: #f76707; }
code { background: #f1f3f5; padding: .05rem .3rem; border-radius: .2rem; }
li { margin: .2rem 0; }
"""

# A click on a header sorts by it, numbers from the largest first; a second one turns
# the order round. Rows that are level keep their order, and empty cells come last.
SCRIPT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, column = head.cellIndex;
    var body = head.closest("table").tBodies[0], numeric = head.className !== "text";
    var was = head.getAttribute("aria-sort");
    var down = was ? was === "ascending" : numeric;
    var key = function (row) { return row.cells[column].dataset.value; };
    var rows = Array.from(body.rows).sort(function (a, b) {
      var x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      var order = numeric ? x - y : x.localeCompare(y);
      return down ? -order : order;
    });
    head.parentNode.querySelectorAll("th").forEach(function (other) {
      other.removeAttribute("aria-sort");
    });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append.apply(body, rows);
  });
});
"""
