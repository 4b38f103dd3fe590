"""The page's style sheet."""

from exflow.report.draw import colours, svg

_PAGE = """\
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main,footer{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 8px}
h3{font-size:15px;margin:20px 0 6px}
p,ul{max-width:74ch;margin:6px 0 12px}
header p,.note,figcaption,small{color:var(--ink-2)}
.note,figcaption,footer{font-size:14px}
small{font-size:.92em}
code{white-space:nowrap}
section{background:var(--surface);
border:1px solid var(--grid);border-radius:8px;padding:20px 22px;margin:18px 0}
nav ul{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;padding:0;max-width:none;font-size:14px}
a{color:var(--link)}
a.term{color:inherit;text-decoration:underline dotted;text-underline-offset:3px}
a:focus-visible,select:focus-visible,input:focus-visible,summary:focus-visible,.scroll:focus-visible{
outline:2px solid var(--intra);outline-offset:2px}
.skip{position:absolute;left:-999px}
.skip:focus{left:12px;top:8px;background:var(--surface);padding:6px 10px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:10px 18px;margin:6px 0 16px}
.facts dt{font-size:13px;color:var(--ink-2)}
.facts dd{margin:0;font-size:17px;font-weight:600;overflow-wrap:anywhere}
.headline{padding-left:20px}
figure{margin:14px 0 22px}
figure svg{display:block;width:100%;min-width:640px;height:auto}
.wide{overflow-x:auto}
.cells.amount{filter:var(--amount)}
.cells.balance{filter:var(--balance)}
.cells.chance{filter:var(--chance)}
.scroll{overflow:auto;max-height:420px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;margin:4px 0}
caption{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
th,td{padding:4px 10px 4px 0;text-align:right;white-space:nowrap;
border-top:1px solid var(--grid);font-weight:400}
thead th{color:var(--ink-2);font-size:12.5px;vertical-align:bottom;border-top:0;
white-space:normal;min-width:64px}
.scroll thead th{position:sticky;top:0;background:var(--surface)}
tbody th,thead .name,.words th,.words td{text-align:left}
.words td{white-space:normal;vertical-align:top}
tr.first>*{border-top:1px solid var(--muted)}
tr:not(.first)>th:first-child{color:transparent}
details{margin:6px 0}
details tr>th:first-child{color:inherit!important}
summary{cursor:pointer;font-size:14px;color:var(--ink-2)}
.controls{display:none;flex-wrap:wrap;gap:8px 22px;align-items:center;margin:10px 0;font-size:14px}
.js .controls{display:flex}
.controls label{display:flex;gap:8px;align-items:center}
select,input{font:inherit;color:var(--ink);background:var(--page);accent-color:var(--intra)}
select{border:1px solid var(--axis);border-radius:5px;padding:3px 6px;max-width:340px}
.glossary{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;font-size:14px}
.glossary dt{font-weight:600}
.glossary dt:target,.glossary dt:target+dd{background:var(--grid)}
.glossary dd{margin:0;color:var(--ink-2)}
.tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--page);font-size:13px;
padding:5px 9px;border-radius:5px;max-width:320px}
[hidden]{display:none!important}
@media (max-width:640px){header,main,footer{padding:0 10px}section{padding:14px}
.glossary{grid-template-columns:1fr}.glossary dd{margin-bottom:8px}}
@media print{body{background:none;font-size:12px}section{border:0;padding:0;break-inside:auto}
nav,.skip,.controls,details,.tip{display:none!important}figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.scroll{overflow:visible;max-height:none}.scroll thead th{position:static}.wide{overflow:visible}
figure svg{min-width:0}table{font-size:9px}th,td{padding:2px 6px 2px 0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def css() -> str:
    return colours.css() + svg.STYLE + _PAGE
