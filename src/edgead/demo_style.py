"""How the demo's report looks, beside what every report of edgead shares."""

from __future__ import annotations

STYLE = """<style>
main{max-width:1120px}
h1{font-size:clamp(1.7rem,4.5vw,2.6rem);letter-spacing:-.02em;max-width:22ch;margin-top:12px}
.lead{font-size:1.1rem;max-width:66ch}
.brand{font-weight:700;letter-spacing:.02em;color:#1f5fbf}
.step{display:grid;grid-template-columns:1fr auto 1fr;gap:18px;align-items:stretch;margin:20px 0 28px}
.step figure,.shot figure{background:#fff;border:1px solid #dde4ea;border-radius:12px;padding:10px}
.step .arrow{align-self:center;text-align:center;color:#1f5fbf;font-size:.92rem;max-width:150px}
.step .arrow b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.step .arrow i{font-style:normal;font-size:2rem;line-height:1;display:block}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:16px}
.shot{background:#fff;border:1px solid #dde4ea;border-radius:12px;padding:10px}
.shot div{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.shot img,.step img{width:100%;display:block;border-radius:8px}
.shot p,.step figcaption{margin:8px 2px 0;font-size:.88rem;color:#667785}
.tags{display:inline-block;font-weight:600;color:#1a2733;margin-right:6px}
.tree{font-size:.85rem}.tree th:last-child,.tree td:last-child{text-align:left;white-space:normal}
.tree td:first-child{font-family:ui-monospace,SFMono-Regular,Menlo,monospace}
.note{font-size:.9rem;color:#667785;margin:12px 0 16px}
.wide svg{min-width:640px}
.plots{display:flex;flex-wrap:wrap;gap:16px;margin:16px 0}.plots .panel{flex:1 1 300px;padding:18px}
.plots svg{margin:0 auto;width:100%;max-width:480px}.plots .panel:last-child svg{max-width:330px}
footer{margin-top:56px;color:#667785;font-size:.88rem;border-top:1px solid #dde4ea;padding-top:16px}
@media(max-width:640px){
.step{grid-template-columns:1fr}.step .arrow{max-width:none}.step .arrow i{transform:rotate(90deg)}
main{padding:18px 14px 48px}th,td{padding:6px 7px}td:first-child{white-space:normal}
.cards{grid-template-columns:1fr 1fr;gap:8px}.card b{font-size:1.25rem}
}
</style>"""
