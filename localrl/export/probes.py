"""Fixed texts on which tokenizers are known to part, and dialogues on which chat templates do."""

from __future__ import annotations

PROBES: tuple[str, ...] = (
    # spaces and lines
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\t\t x", "a", " a", "a ", "  a  ",
    "Hello world", " leading and trailing ", "two  spaces   three", "tabs\tand\nnewlines\n\n\nand\r\nmore \n \n end",
    "line one\nline two\n\nparagraph\n", "    four spaces of indentation\n        eight", "x\n\n\n\ny", "trailing newline \n",
    "\u3000ideographic space\u3000",
    # contractions and apostrophes
    "It's what they'll say: I'm, you've, he'd, we're, DON'T, CAN'T", "'s 't 're 've 'm 'll 'd", "rock'n'roll o'clock ''quoted'' '90s",
    "L'été d'aujourd'hui n'est",
    # numbers
    "12345 + 67890 = 80235; 3.14159, 1,000,000 and 0x1F", "1 12 123 1234 12345", "1234567890", "1e-5 -7 +3 2^10 50% $9.99 €12,50",
    "2026-11-25T20:53:01Z",
    "1st 2nd 3rd v1.2.3 x86_64 a1b2c3", "½ ² ³ ⅷ Ⅻ ① ٣ १ 五",
    # cases and identifiers
    "CamelCase snake_case kebab-case SCREAMING_CASE iPhone", "HTTPServer parseXMLFile eBay McDonald's USA's", "Ab aB AB ab ABc aBC",
    # code
    "def f(x: int) -> int:\n    return x ** 2  # comment\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "if __name__ == '__main__':\n    main()\n",
    'SELECT * FROM t WHERE a >= 1 AND b != "x"; -- note',
    "#include <stdio.h>\nint main(void) { return 0; }", "print(f'{x!r:>10}')\\n", "a->b && c || !d ? e : f;",
    # markup and data
    "<b>html & entities</b> &amp; {json: [1, 2]}", '{"key": "value", "n": [1, 2.5, null, true]}', "# Title\n\n* item\n* item\n\n| a | b |\n|---|---|\n",
    "https://example.org/a?b=c&d=%20#frag user@example.org", "C:\\Users\\name\\file.txt /usr/local/bin ~/.config",
    # mathematics
    "$x^2 + \\frac{1}{2}$ \\boxed{42}", "\\begin{align} a &= b \\\\ c &\\ne d \\end{align}", "∀x∈ℝ: x² ≥ 0 ⇒ ∑ᵢ aᵢ ≤ ∞", "a≈b ± 0.5 × 10⁻³",
    # Latin with marks, other alphabets
    "naïve café Ångström straße ﬁne", "Zażółć gęślą jaźń, příliš žluťoučký kůň", "İstanbul'da ığdır", "Đây là tiếng Việt có dấu",
    "Привет, мир! Ελληνικά", "Українська мова: ґава, їжак", "ΑΒΓ αβγ ΆΈΉ", "Հայերեն ქართული",
    # scripts without spaces, right to left, marks that combine
    "你好，世界。今天天气很好 日本語のテスト 한국어", "東京タワーに行きました。カタカナ・ひらがな", "繁體中文與简体字混排123abc", "안녕하세요, 반갑습니다!",
    "שלום עולם مرحبا بالعالم", "السلام عليكم ٢٠٢٤", "हिन्दी ไทย", "বাংলা தமிழ் తెలుగు", "ភាសាខ្មែរ မြန်မာ ລາວ", "e\u0301 combining",
    "a\u0323\u0307 q\u0307\u0323",
    # emoji and what cannot be seen
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 and ½ ² ③ € ™ …", "👍🏽 🏳️‍🌈 ❤️ ☎ 🤷🏿‍♂️", "🙂🙂🙂 x🙂y", "zero\u200bwidth\u200dand\ufefffeff",
    "soft\u00adhyphen\u00a0nbsp", "\u202eright to left\u202c",
    "control \x01\x02 and \x7f", "𝕳𝖊𝖑𝖑𝖔 𐍈 𠜎",
    # punctuation
    "“quotes” ‘and’ — dashes – \u00a0nbsp \u200bzero \ufeffbom", "!!! ??? ... --- === *** ///", "(a) [b] {c} <d> «e» „f“ 「g」",
    "?!…;:,.·•", "~`@#%^&*_+=|\\", "end.Start,no space;at:all",
    # what reasoning models write
    "<think>\nLet me see.\n</think>\n<answer>42</answer>", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>",
    "Step 1: 8+6=14, carry 1.\nStep 2: 4+2+1=7.\n\n**Answer:** 74",
    "<|not a token|> <| endoftext |> [INST] <<SYS>> </s", "###Instruction:\nUser:Assistant:",
    # long ones
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Donaudampfschifffahrtsgesellschaftskapitän",
    "lorem ipsum dolor sit amet, " * 4, "0" * 40, "=" * 50, "ha" * 20,
)  # fmt: skip
"""Each once with and once without what the tokenizer puts around a text."""

DIALOGUES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße! 你好"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nYes?"}, {"role": "user", "content": " Again\n"}],
)
"""Each with and without the opening of the reply."""
