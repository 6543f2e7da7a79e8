"""The tokenizer wrapper against transformers, on small tokenizers made here."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minicot.errors import InputError
from minicot.tokenizer import Tokenizer

TEXTS = [
    "Anna has 12 apples.",
    "  two spaces\n\nand lines ",
    "naïve café — ½ 🍎🍏",
    "",
    "<|im_start|>user\nHi<|im_end|>",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ' What is 2 < 3 & "4"? é '},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": "Why?"},
]
TEMPLATES = {
    "bos and eos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "blocks on their own lines": """
        {% for message in messages %}
            {% if message.role == 'system' %}
{{ message.content }}
            {% else %}
<{{ message.role }}> {{ message.content | trim }}
            {% endif %}
        {% endfor %}
        {%- if add_generation_prompt %}<assistant>{% endif %}
""",
    "tojson, namespace, break": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}"
    "{{ m | tojson }}{{ {'a': [1, 'é<']} | tojson(indent=2) }}"
    "{% if ns.n == 3 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    "generation and date": "{{ strftime_now('%Y') }}{% for m in messages %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endfor %}",
    "absent variables": "{% if tools %}tools{% endif %}{% if tools is not none %}x{% endif %}"
    "{{ unk_token }}|{{ nothing }}{% if documents is defined %}d{% endif %}",
}


def edit(folder, name="tokenizer_config.json", **changes):
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
    return folder


def refused(folder, *parts):
    with pytest.raises(InputError) as caught:
        Tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message, message


# ---- text and ids ----------------------------------------------------


def test_ids_and_text_equal_transformers(tokenizer_folder):
    ours, theirs = Tokenizer(tokenizer_folder), transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special=False) == text == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert all(0 <= i < ours.vocab_size for i in ids)
    assert ours.vocab_size == len(theirs)


def test_a_template_processor_adds_nothing(tokenizer_folder):
    plain = Tokenizer(tokenizer_folder).encode("Anna has 12")
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    start = "<|im_start|>"
    backend.post_processor = processors.TemplateProcessing(single=start + " $A", special_tokens=[(start, 1)])
    backend.enable_padding(length=30)
    backend.enable_truncation(2)
    backend.save(str(tokenizer_folder / "tokenizer.json"))
    assert Tokenizer(tokenizer_folder).encode("Anna has 12") == plain


def llama3_like(folder):
    """Byte-level BPE as Llama 3's: punctuation takes the space behind it, and offsets come trimmed."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\s*|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.train_from_iterator(
        ["The answer is seven.\n\nThe answer is café.  "] * 9,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def llama2_like(folder):
    """BPE over characters with SentencePiece's conventions: a mark before each word, bytes for the rest."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        ["The answer is seven. The answer is café. "] * 9,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False),
    )
    return backend


@pytest.mark.parametrize("build", [llama3_like, llama2_like])
def test_the_boundary_of_a_pair_is_exact_at_every_cut(build, tmp_path):
    """Tokens before the boundary lie inside the prompt, and the first behind it reaches beyond."""
    build(tmp_path).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(edit(tmp_path, eos_token="</s>"))
    text, merged = "The answer is seven.\n\nThe 🍎 café  is.\n\n", 0
    for cut in range(len(text) + 1):
        prompt, response = text[:cut], text[cut:]
        ids, n_prompt = tokenizer.encode_pair(prompt, response)
        assert ids == tokenizer.encode(text)  # jointly
        before, beyond = (tokenizer.decode(ids[:n], skip_special=False) for n in (n_prompt, n_prompt + 1))
        assert prompt.startswith(before.rstrip("\ufffd"))  # what part of a character decodes to
        assert n_prompt == len(ids) or beyond.endswith("\ufffd") or not prompt.startswith(beyond)
        merged += before != prompt
    assert tokenizer.encode_pair(text, "") == (tokenizer.encode(text), len(tokenizer.encode(text)))
    assert merged > 5  # cuts inside tokens did occur


def test_a_token_over_the_boundary_belongs_to_the_response(tmp_path):
    llama3_like(tmp_path).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(edit(tmp_path, eos_token="</s>"))
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("The answer is seven.\n\n")]
    assert tokens == ["The", " answer", " is", " seven", ".\n\n"]
    assert tokenizer.encode_pair("The ans", "wer is seven.\n\n")[1] == 1
    assert tokenizer.encode_pair("The answer", " is seven.\n\n")[1] == 2
    assert tokenizer.encode_pair("The answer ", "is seven.\n\n")[1] == 2
    assert tokenizer.encode_pair("The answer is seven.", "\n\n")[1] == 4
    # trimmed offsets would say that ".  " ends at the full stop, and give the response's spaces to the prompt
    assert tokenizer.decode(tokenizer.encode("The answer is seven.  ")[4:]) == ".  "
    assert tokenizer.encode_pair("The answer is seven.", "  ")[1] == 4
    assert tokenizer.encode_pair("", "The answer")[1] == 0


# ---- special ids ----------------------------------------------------


def test_special_ids_are_read_from_strings_and_objects(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, 2, (2,))
    edit(tokenizer_folder, pad_token="<|endoftext|>", bos_token=None)
    tokenizer = Tokenizer(tokenizer_folder)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, 0)


@pytest.mark.parametrize("given, stops", [(0, (2, 0)), ([2, 0], (2, 0)), ([0, 7], (2, 0, 7)), (None, (2,))])
def test_several_eos_ids_all_stop(tokenizer_folder, given, stops):
    edit(tokenizer_folder, "generation_config.json", eos_token_id=given)
    assert Tokenizer(tokenizer_folder).stop_ids == stops


def test_eos_may_come_from_generation_config_alone(tokenizer_folder):
    edit(tokenizer_folder, eos_token=None)
    refused(tokenizer_folder, "no eos in")
    edit(tokenizer_folder, "generation_config.json", eos_token_id=[2, 0])
    assert Tokenizer(tokenizer_folder).eos_id == 2


def test_bad_folders_are_refused_in_one_line(tokenizer_folder, tmp_path):
    refused(tmp_path / "nowhere", "no tokenizer.json")
    whole = (tokenizer_folder / "tokenizer_config.json").read_text()
    for change, parts in [
        ({"eos_token": "</s>"}, ("eos_token '</s>'", "vocabulary")),
        ({"pad_token": {"content": "[PAD]"}}, ("pad_token '[PAD]'", "vocabulary")),
        ({"bos_token": 1}, ("bos_token 1", "neither a string nor")),
        ({"chat_template": [{"name": "rag", "template": ""}]}, ("no 'default'", "rag")),
        ({"chat_template": {"default": ""}}, ("chat_template is dict",)),
    ]:
        (tokenizer_folder / "tokenizer_config.json").write_text(whole)
        refused(edit(tokenizer_folder, **change), "tokenizer_config.json", *parts)
    (tokenizer_folder / "tokenizer_config.json").write_text(whole[:-1] + "\n,")
    refused(tokenizer_folder, "tokenizer_config.json:2: not JSON")
    (tokenizer_folder / "tokenizer_config.json").write_text("[]")
    refused(tokenizer_folder, "tokenizer_config.json", "list")
    (tokenizer_folder / "tokenizer_config.json").write_bytes(b"\xff")
    refused(tokenizer_folder, "tokenizer_config.json", "not UTF-8")
    (tokenizer_folder / "tokenizer_config.json").write_text(whole)
    for bad in ("</s>", [2, 10_000], [True], -1):
        refused(edit(tokenizer_folder, "generation_config.json", eos_token_id=bad), "generation_config.json")
    for bad in ("{", '{"model": {"type": "Magic"}}', "[]"):
        (tokenizer_folder / "tokenizer.json").write_text(bad)
        refused(tokenizer_folder, "tokenizer.json: no readable tokenizer")


# ---- chat ----------------------------------------------------


def chats(folder, messages=MESSAGES):
    """((ours, transformers') without, (ours, transformers') with the generation prompt)."""
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return [
        (
            ours.chat_prompt(messages, add_generation_prompt=add),
            theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add),
        )
        for add in (False, True)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_prompts_equal_transformers(name, tokenizer_folder):
    edit(tokenizer_folder, chat_template=TEMPLATES[name])
    for ours, theirs in chats(tokenizer_folder):
        assert ours == theirs and ours


def test_chatml_prompt_is_the_expected_text(tokenizer_folder):
    (without, theirs), (prompt, _) = chats(tokenizer_folder, [{"role": "user", "content": "Hi "}])
    assert without == theirs == "<|im_start|>user\nHi<|im_end|>\n"
    assert prompt == without + "<|im_start|>assistant\n"
    assert Tokenizer(tokenizer_folder).encode(prompt)[0] == 1


def test_a_template_file_wins_and_of_named_templates_the_default(tokenizer_folder):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    edit(tokenizer_folder, chat_template=named)
    assert chats(tokenizer_folder) == [("default", "default")] * 2
    (tokenizer_folder / "chat_template.jinja").write_text("file")
    assert chats(tokenizer_folder) == [("file", "file")] * 2


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "no chat_template.jinja"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ messages[0].content + 1 }}", "chat template"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ (1).x.y }}", "no attribute"),
    ],
)
def test_an_absent_broken_or_unsafe_template_is_refused_in_one_line(template, reason, tokenizer_folder):
    tokenizer = Tokenizer(edit(tokenizer_folder, chat_template=template))
    with pytest.raises(InputError) as caught:
        tokenizer.chat_prompt(MESSAGES)
    message = str(caught.value)
    assert str(tokenizer_folder) in message and reason in message and "\n" not in message


GIVEN = "{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}{% endfor %}\r\n# é\n"


@pytest.mark.parametrize("own", ["none", "in tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("given", ["plain", "a file"])
def test_a_given_template_wins_is_saved_and_read_again_as_transformers_reads_it(
    given, own, tokenizer_folder, tmp_path
):
    edit(tokenizer_folder, chat_template="own" if own == "in tokenizer_config.json" else None)
    if own == "chat_template.jinja":
        (tokenizer_folder / own).write_text("own")
    before = {file.name: file.read_bytes() for file in tokenizer_folder.iterdir()}
    file = tmp_path / "given.jinja"
    file.write_bytes(GIVEN.encode())
    tokenizer = Tokenizer(tokenizer_folder, chat_template="plain" if given == "plain" else str(file))
    messages = MESSAGES[:2]
    expected = (
        'Be brief.\n What is 2 < 3 & "4"? é \n'
        if given == "plain"
        else '<|im_start|>(system) Be brief.(user)  What is 2 < 3 & "4"? é # é'
    )
    tokenizer.save(tmp_path / "copy")
    for read in (tokenizer, Tokenizer(tmp_path / "copy"), Tokenizer(tmp_path / "copy", chat_template="")):
        assert read.chat_prompt(messages) == read.chat_prompt(messages, False) == expected
        assert read.fingerprint == tokenizer.fingerprint
    assert chats(tmp_path / "copy", messages) == [(expected, expected)] * 2
    assert tokenizer.fingerprint != Tokenizer(tokenizer_folder).fingerprint
    assert {file.name: file.read_bytes() for file in tokenizer_folder.iterdir()} == before
    if given == "a file":
        assert (tmp_path / "copy" / "chat_template.jinja").read_bytes() == GIVEN.encode()


def test_a_base_model_without_a_template_names_the_remedy(tokenizer_folder):
    tokenizer = Tokenizer(edit(tokenizer_folder, chat_template=None))
    with pytest.raises(InputError, match=r"no chat_template.jinja.*: --chat-template FILE\|plain$"):
        tokenizer.chat_prompt(MESSAGES)
    assert Tokenizer(tokenizer_folder, "plain").chat_prompt([{"role": "user", "content": "Hi"}]) == "Hi\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file; allowed: a file that is there, or plain"),
        (b"{% for %}", "no jinja template in UTF-8 (Expected an expression"),
        (b"{{ messages ", "no jinja template in UTF-8 (unexpected end of template"),
        (b"\xff", "no jinja template in UTF-8 ('utf-8' codec can't decode"),
    ],
)
def test_a_given_template_that_is_missing_or_broken_is_refused_at_once(
    content, reason, tokenizer_folder, tmp_path
):
    file = tmp_path / "given.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Tokenizer(tokenizer_folder, str(file))
    assert str(file) in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_given_template_that_fails_on_messages_is_named(tokenizer_folder, tmp_path):
    file = tmp_path / "given.jinja"
    file.write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="given.jinja: chat template: no system role"):
        Tokenizer(tokenizer_folder, str(file)).chat_prompt(MESSAGES)


# ---- files ----------------------------------------------------


def test_saving_copies_every_file_byte_for_byte(tokenizer_folder, tmp_path):
    (tokenizer_folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n\n")
    edit(tokenizer_folder, "generation_config.json", eos_token_id=[2, 0])
    tokenizer = Tokenizer(tokenizer_folder)
    tokenizer.save(tmp_path / "copy")
    names = sorted(file.name for file in tokenizer_folder.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "copy").iterdir()) and len(names) == 4
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert Tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_the_fingerprint_tells_tokenizers_and_templates_apart(tokenizer_folder, tmp_path):
    first = Tokenizer(tokenizer_folder).fingerprint
    edit(tokenizer_folder, model_max_length=5)
    assert Tokenizer(tokenizer_folder).fingerprint == first  # changes neither ids nor prompts
    edit(tokenizer_folder, chat_template="other")
    assert Tokenizer(tokenizer_folder).fingerprint != first
    llama3_like(tmp_path).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(edit(tmp_path, eos_token="</s>")).fingerprint != first
