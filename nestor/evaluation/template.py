# ruff: noqa: E501 -- the lines of the page are as long as HTML and CSS need them
"""The page that `report` fills: one file, no network, light and dark."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root {
  --ground: #f6f7f9; --card: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d8dde3; --accent: #0b63a5;
  --good: #0f7a4f; --bad: #b3261e; --code: #f0f2f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0d1117; --card: #161b22; --ink: #e6edf3; --soft: #9aa5b1; --line: #303842; --accent: #6cb6ff;
    --good: #4cc38a; --bad: #ff8a80; --code: #1e252e;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 0 0 .8rem; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .5rem; }
p { margin: .5rem 0 .9rem; max-width: 46rem; }
a { color: var(--accent); }
.subtitle { color: var(--soft); margin: 0 0 1.2rem; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin-bottom: 1.6rem; font-size: .93rem; }
nav a { text-decoration: none; }
nav a:hover, nav a:focus-visible { text-decoration: underline; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.4rem 1.5rem 1.2rem;
  margin-bottom: 1.4rem;
}
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 0 0 1.1rem; }
.facts div { border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: .1rem 0 0; font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.facts dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.wide { overflow-x: auto; margin: .4rem 0 1rem; }
td { white-space: nowrap; }
.settings td.left, td.text { white-space: normal; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .45rem; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
th.left, td.left { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
figure { margin: 1rem 0 1.5rem; }
figure img { width: 100%; max-width: 50rem; height: auto; display: block; border-radius: 8px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 50rem; }
.sample { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .9rem; margin: .9rem 0; }
.sample.right { border-color: var(--good); }
.sample.wrong { border-color: var(--bad); }
.sample h4 { margin: 0 0 .25rem; font-size: .88rem; font-weight: 600; color: var(--soft); }
.sample dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: 0; font-size: .93rem; }
.sample dt { color: var(--soft); }
.sample dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; font-family: ui-monospace, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: .88rem; }
pre {
  background: var(--code); border-radius: 8px; padding: .75rem .95rem; overflow-x: auto; margin: .3rem 0 .9rem;
  font: .87rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.settings td.left:first-child { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .84rem; white-space: nowrap; }
.settings td { overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .93rem; }
footer { color: var(--soft); font-size: .85rem; }
@media print { body { background: #fff; } section { break-inside: avoid; } nav { display: none; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% if subtitle %}<p class="subtitle">{{ subtitle }}</p>{% endif %}
<nav aria-label="Sections">{% for section in sections %}<a href="#{{ section.id }}">{{ section.title }}</a>
{% endfor %}</nav>
</header>
{% for section in sections %}
<section id="{{ section.id }}">
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}
{% if block.kind == "text" %}<p{% if block.note %} class="note"{% endif %}>{{ block.text }}</p>
{% elif block.kind == "heading" %}<h3>{{ block.text }}</h3>
{% elif block.kind == "facts" %}<dl class="facts">
{% for fact in block.facts %}<div><dt>{{ fact.label }}</dt>
<dd>{{ fact.value }}{% if fact.detail %}<small>{{ fact.detail }}</small>{% endif %}</dd></div>
{% endfor %}</dl>
{% elif block.kind == "table" %}<div class="wide"><table>
{% if block.caption %}<caption>{{ block.caption }}</caption>{% endif %}
<thead><tr>{% for column in block.columns %}<th scope="col"{% if column.left %} class="left"{% endif %}>
{{ column.name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in block.rows %}<tr>{% for cell in row %}
<td{% if block.columns[loop.index0].left %} class="left"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% elif block.kind == "plot" %}<figure><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{{ block.dark }}">
<img src="data:image/png;base64,{{ block.light }}" alt="{{ block.alt }}" loading="lazy"></picture>
{% if block.caption %}<figcaption>{{ block.caption }}</figcaption>{% endif %}</figure>
{% elif block.kind == "sample" %}<div class="sample {{ block.mark }}">
{% if block.title %}<h4>{{ block.title }}</h4>{% endif %}
<dl>{% for label, value in block.parts %}<dt>{{ label }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></div>
{% elif block.kind == "commands" %}{% for words, command in block.commands %}<p>{{ words }}</p>
<pre>{{ command }}</pre>{% endfor %}
{% elif block.kind == "settings" %}<details{% if block.open %} open{% endif %}><summary>{{ block.title }}</summary>
<div class="wide"><table class="settings"><tbody>{% for name, value in block.settings %}
<tr><td class="left">{{ name }}</td><td class="left">{{ value }}</td></tr>{% endfor %}</tbody></table></div></details>
{% endif %}{% endfor %}
</section>
{% endfor %}
<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""
