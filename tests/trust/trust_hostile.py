"""Strings that would run, fetch, restyle or confuse if a page took them for anything but text."""

from __future__ import annotations

RUN = "document.documentElement.setAttribute('data-ran','1')"
"""What a payload does when it runs: a mark that the test looks for."""


def strings(remote: str) -> list[str]:
    """At least 100 of them; `remote` is the address a fetch would go to."""
    script = [
        f"<script>{RUN}</script>",
        f"</script><script>{RUN}</script>",
        f"</title><script>{RUN}</script>",
        f"</style><script>{RUN}</script>",
        f"</textarea><script>{RUN}</script>",
        f"--><script>{RUN}</script>",
        f"]]><script>{RUN}</script>",
        f"'><script>{RUN}</script>",
        f'"><script>{RUN}</script>',
        f"<SCRIPT>{RUN}</SCRIPT>",
        f"<scr\0ipt>{RUN}</scr\0ipt>",
        f"<<script>{RUN}//<</script>",
        f"<script\x0c>{RUN}</script\x0c>",
        f"<script src={remote}/x.js></script>",
        f"<script type=module>import '{remote}/x.mjs'</script>",
        f"<!--<script>{RUN}</script>-->",
        f"&lt;script&gt;{RUN}&lt;/script&gt;",
        f"&#60;script&#62;{RUN}&#60;/script&#62;",
        f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
        f"%3Cscript%3E{RUN}%3C/script%3E",
        f"＜script＞{RUN}＜/script＞",
        f"+ADw-script+AD4-{RUN}+ADw-/script+AD4-",
        f"<script>{RUN}",
        f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    ]
    events = [
        f"<{tag} {event}={RUN}>"
        for tag, event in (
            ("img src=x", "onerror"), ("svg", "onload"), ("body", "onload"), ("video src=x",
            "onerror"), ("audio src=x", "onerror"), ("input autofocus", "onfocus"), ("details open",
            "ontoggle"), ("select autofocus", "onfocus"), ("marquee", "onstart"),
            ("iframe src=about:blank", "onload"), ("object data=x", "onerror"), ("style", "onload"),
            ("link rel=stylesheet href=x", "onerror"), ("math", "onclick"),
            ("div style=animation:x", "onanimationstart"),
        )
    ]  # fmt: skip
    attributes = [
        f'" onmouseover="{RUN}" x="',
        f"' onfocus='{RUN}' autofocus='",
        f"` onload=`{RUN}",
        f'"><img src=x onerror="{RUN}">',
        f"x onerror={RUN}",
        f'" style="background:url({remote}/a)" x="',
        f'"><a href="javascript:{RUN}">here</a>',
        f"javascript:{RUN}",
        f"JaVaScRiPt:{RUN}",
        f"java\tscript:{RUN}",
        f"&#106;avascript:{RUN}",
        f"data:text/html,<script>{RUN}</script>",
        f"data:text/html;base64,{'PHNjcmlwdD4='}",
        f"vbscript:{RUN}",
    ]
    fetches = [
        f"<img src={remote}/i.png>",
        f"<img srcset='{remote}/i.png 1x'>",
        f"<link rel=prefetch href={remote}/p>",
        f"<link rel=stylesheet href={remote}/s.css>",
        f"<iframe src={remote}/f></iframe>",
        f"<object data={remote}/o></object>",
        f"<embed src={remote}/e>",
        f"<video poster={remote}/v></video>",
        f"<audio src={remote}/a></audio>",
        f"<base href={remote}/>",
        f"<form action={remote}/post><button autofocus>x</button></form>",
        f"<meta http-equiv=refresh content='0;url={remote}/m'>",
        "<meta http-equiv=Content-Security-Policy content=\"script-src 'unsafe-inline'\">",
        f"<svg><image href={remote}/g /></svg>",
        f"<svg><use href={remote}/u#x /></svg>",
        f"<body background={remote}/b>",
        f"<table background={remote}/t><td>",
        f"<input type=image src={remote}/n>",
        f"<portal src={remote}/q></portal>",
        f"<a ping={remote}/ping href=#>x</a>",
        f"<a href='{remote}/plain'>link</a>",
    ]
    styles = [
        f"<style>*{{background:url({remote}/c)}}</style>",
        f"<style>@import '{remote}/i.css';</style>",
        f"<div style='background:url({remote}/d)'>",
        f"<style>@font-face{{font-family:a;src:url({remote}/w)}}</style>",
        f"x;background:url({remote}/k)",
        "}</style><style>body{display:none}",
        "expression(alert(1))",
        "<style>body{visibility:hidden}</style>",
    ]
    templates = [
        "{{7*7}}", "{{constructor.constructor('return 1')()}}", "${7*7}", "#{7*7}", "<%= 7*7 %>",
        "{% include 'secret' %}", "{0.__class__}", "%s%s%s%n", "%(name)s", "$(touch x)",
        "`touch x`", "{{[].__class__}}", "[[${7*7}]]", "{label}",
    ]  # fmt: skip
    sheets = [
        "=1+1", "=HYPERLINK(\"" + remote + "\",\"x\")", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)",
        "\t=1+1", "=IMPORTXML(\"" + remote + "\",\"//a\")", "|calc", "%0A=1",
    ]  # fmt: skip
    markdown = [
        f"[x](javascript:{RUN})", f"![x]({remote}/md.png)", "# heading", "| a | b |\n|---|---|",
        f"<{remote}/auto>", "```js\nx\n```", f"[x]: {remote}/ref", "**bold**", "<br>", "<hr/>",
    ]  # fmt: skip
    odd = [
        "\u202egnp.exe\u202c", "\u2028\u2029", "a\u0300" * 40, "\ufeffbom", "\u200b\u200d", "𝕊𝔽𝕋",
        "نص", "🧪" * 20, "\x1b[31mred\x1b[0m", "a\x08\x08b", "line\nbreak\r\nand\rmore",
        "\x7f\x80\x9f",
        "\ufffe\uffff", "'; DROP TABLE runs; --", "../../etc/passwd", "C:\\con\\aux", "NaN",
        "null", "true", "__proto__", "constructor", "toString", "\\", "\\\\'\\\"", "'", '"', "&",
        "<", ">", "&amp;lt;", "&nbsp", "<b>bold</b>", "<i", "</td></tr></table></div>",
        "x" * 4000, " ", "\\x3cscript\\x3e", "<sub>1</sub>", "$$\\href{javascript:1}{x}$$",
    ]  # fmt: skip
    plotly = [
        f'<a href="javascript:{RUN}">x</a>',
        f'<a href="{remote}/plotly">x</a>',
        f'<span style="background:url({remote}/z)">x</span>',
        f"<a href='data:text/html,<script>{RUN}</script>' target=_self>x</a>",
        "%{customdata.__proto__}",
        "%{x}<extra></extra>",
        f'<b onclick="{RUN}">b</b>',
        "<sup>" * 30,
    ]
    return [*script, *events, *attributes, *fetches, *styles, *templates, *sheets, *markdown,
            *odd, *plotly]  # fmt: skip
