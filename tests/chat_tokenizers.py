"""Make tiny tokenizers, trained on TEXTS, with chat templates like those of known models."""

TEXTS = ["what color is the fox ?", "the fox is red .", "say hello twice .", "A fox. What is red?", "Hm. a blue bird ."]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = LLAMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>",
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}{%- set said = m.content %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- said + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}OPEN{%- endif %}
{%- endif %}"""
QWEN35, QWEN3 = QWEN3.replace("OPEN", "{%- else %}{{- '<think>\\n' }}"), QWEN3.replace("OPEN", "")
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
OLD = ("<unk>", "<s>", "</s>")
THINK = ("<think>", "</think>")
KINDS = {  # template, special tokens, other added tokens, and the special tokens' roles
    "chatml": (CHATML, QWEN, (), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama2": (LLAMA2, OLD, (), {"bos_token": "<s>", "eos_token": "</s>"}),
    "mistral": (MISTRAL, (*OLD, "[INST]", "[/INST]"), (), {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama3": (LLAMA3, HEADERS, (), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "dated": (DATED, HEADERS, (), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "gemma": (GEMMA, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), (),
              {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "phi": (PHI, (*OLD, "<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>"), (),
            {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "zephyr": (ZEPHYR, OLD, (), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}),
    "qwen3": (QWEN3, QWEN, THINK, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen3.5": (QWEN35, QWEN, THINK, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "r1": (R1, (*OLD, "<|User|>", "<|Assistant|>"), THINK, {"bos_token": "<s>", "eos_token": "</s>"}),
}  # fmt: skip


def make(kind: str):
    """Return a new tokenizer of one of KINDS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, special, added, roles = KINDS[kind]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 400, "show_progress": False, "initial_alphabet": alphabet}
    bpe.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(special_tokens=list(special), **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **roles)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = template
    return tokenizer
