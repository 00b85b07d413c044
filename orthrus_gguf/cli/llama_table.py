"""llama.cpp's flags, and what each of them does here: data, which `llama_flags` reads.

The flags are those that llama-cli, llama-completion and llama-server document.
"""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """What a flag does here, in the words of the table."""

    SUPPORTED = "works"
    ACCEPTED = "accepted without effect"
    REFUSED = "not supported"


#: Status, note, flags. The note says why there is no effect, or what to do instead. Flags end with
#: a semicolon: NAMES VALUES =harmless $VARIABLE, where a value in brackets may be left out, a
#: refused flag is accepted with a harmless value, and the variable is the environment's.
GROUPS: tuple[tuple[Status, str, str], ...] = (
    (
        Status.SUPPORTED,
        "",
        """
        -h --help --usage; --version; -v --verbose --log-verbose; --list-devices;
        -m --model FNAME $LLAMA_ARG_MODEL; -hf -hfr --hf-repo REPO $LLAMA_ARG_HF_REPO;
        -dev --device DEV $LLAMA_ARG_DEVICE; -md --model-draft --spec-draft-model FNAME;
        -t --threads N $LLAMA_ARG_THREADS; -b --batch-size N $LLAMA_ARG_BATCH;
        -ctk --cache-type-k TYPE $LLAMA_ARG_CACHE_TYPE_K;
        -ctv --cache-type-v TYPE $LLAMA_ARG_CACHE_TYPE_V; -c --ctx-size N $LLAMA_ARG_CTX_SIZE;
        -n --predict --n-predict N $LLAMA_ARG_N_PREDICT; -p --prompt PROMPT; -f --file FNAME;
        -sys --system-prompt PROMPT; -sysf --system-prompt-file FNAME; -e --escape --no-escape;
        -r --reverse-prompt PROMPT; -s --seed SEED; --temp --temperature N $LLAMA_ARG_TEMPERATURE;
        --top-k N $LLAMA_ARG_TOP_K; --top-p N $LLAMA_ARG_TOP_P; --min-p N $LLAMA_ARG_MIN_P;
        --repeat-penalty N $LLAMA_ARG_REPEAT_PENALTY; --repeat-last-n N;
        --presence-penalty N $LLAMA_ARG_PRESENCE_PENALTY;
        --frequency-penalty N $LLAMA_ARG_FREQUENCY_PENALTY; --ignore-eos;
        -no-cnv --no-conversation; -rea --reasoning on|off|auto $LLAMA_ARG_REASONING;
        --perf --no-perf $LLAMA_ARG_PERF;
        --show-timings --no-show-timings $LLAMA_ARG_SHOW_TIMINGS;
        """,
    ),
    (
        Status.ACCEPTED,
        "a model runs on the GPU as a whole, or on the CPU as a whole (--device cpu)",
        """
        -ngl --gpu-layers --n-gpu-layers N; -sm --split-mode MODE; -fit --fit [on|off];
        -fitt --fit-target MIB; -fitc --fit-ctx N; -kvo --kv-offload -nkvo --no-kv-offload;
        --op-offload --no-op-offload; --no-host; -ncffn --n-cpu-ffn N;
        -ot --override-tensor PATTERN=TYPE;
        """,
    ),
    (
        Status.ACCEPTED,
        "models with experts are not supported, so there are none to place",
        "-cmoe --cpu-moe; -ncmoe --n-cpu-moe N; --moe-cache-mib N;",
    ),
    (
        Status.ACCEPTED,
        "attention is computed in one way, which needs no switch",
        "-fa --flash-attn [on|off|auto]; --swa-full;",
    ),
    (
        Status.ACCEPTED,
        "the CPU maps the file into memory, a GPU holds a copy of it",
        """
        --mlock; --mmap --no-mmap; -dio --direct-io -ndio --no-direct-io; -lm --load-mode MODE;
        -lzm --lazy-mode MODE; --repack -nr --no-repack;
        """,
    ),
    (
        Status.ACCEPTED,
        "how a prompt is cut into passes never changes the text; -b sets the tokens per pass",
        "-ub --ubatch-size N;",
    ),
    (
        Status.ACCEPTED,
        "-t sets the threads of every pass; taskset and nice place and rank the process",
        """
        -tb --threads-batch N; -C --cpu-mask M; -Cr --cpu-range LO-HI; --cpu-strict 0|1; --prio N;
        --poll N; -Cb --cpu-mask-batch M; -Crb --cpu-range-batch LO-HI; --cpu-strict-batch 0|1;
        --prio-batch N; --poll-batch 0|1; --numa TYPE;
        """,
    ),
    (
        Status.ACCEPTED,
        "nothing is run before the first prompt",
        "--warmup --no-warmup;",
    ),
    (
        Status.ACCEPTED,
        "the file's template is always rendered by Jinja; --raw goes without it",
        "--jinja --no-jinja;",
    ),
    (
        Status.ACCEPTED,
        "without -p there is a chat, with -p one answer",
        """
        -cnv --conversation; -st --single-turn; -i --interactive; -if --interactive-first;
        -mli --multiline-input; --simple-io;
        """,
    ),
    (
        Status.ACCEPTED,
        "the text is not coloured, unless by --show-drafts",
        "-co --color [on|off|auto];",
    ),
    (
        Status.ACCEPTED,
        "stdout holds the answer alone, never the prompt",
        "--display-prompt --no-display-prompt;",
    ),
    (
        Status.ACCEPTED,
        "status goes to stderr, a line each, and there is no log beside it",
        """
        --log-disable; --log-colors [on|off|auto]; --log-jsonl --no-log-jsonl;
        -lv --verbosity --log-verbosity N; --log-prefix --no-log-prefix;
        --log-timestamps --no-log-timestamps; -ptc --print-token-count N;
        """,
    ),
    (
        Status.ACCEPTED,
        "one conversation has one cache, which keeps what the next prompt can use",
        """
        -np --parallel N; -cb --cont-batching -nocb --no-cont-batching; -dt --defrag-thold N;
        -ctxcp --ctx-checkpoints --swa-checkpoints N; -cms --checkpoint-min-step N;
        -cram --cache-ram N; -kvu --kv-unified -no-kvu --no-kv-unified; --kv-unified-per-slot N;
        --cache-idle-slots --no-cache-idle-slots; --cache-prompt --no-cache-prompt;
        --cache-reuse N;
        """,
    ),
    (
        Status.ACCEPTED,
        "tokens are drawn where the logits are, on every runtime",
        "-bs --backend-sampling;",
    ),
    (
        Status.REFUSED,
        "one GPU runs the model; choose it with --device cuda:N",
        "-ts --tensor-split N0,N1,…; -mg --main-gpu INDEX =0; --rpc SERVERS;",
    ),
    (
        Status.REFUSED,
        "download the file and name it with -m; orthrus-convert takes Hugging Face repositories",
        """
        -hff --hf-file FILE; -hft --hf-token TOKEN; -mu --model-url URL;
        -dr --docker-repo REPO; -cl --cache-list; --gpt-oss-20b-default; --gpt-oss-120b-default;
        --vision-gemma-4b-default; --vision-gemma-12b-default; --embd-gemma-default;
        --fim-qwen-1.5b-default; --fim-qwen-3b-default; --fim-qwen-7b-default; --fim-qwen-7b-spec;
        --fim-qwen-14b-spec; --fim-qwen-30b-default;
        """,
    ),
    (
        Status.REFUSED,
        "set HF_HUB_OFFLINE=1, which keeps the download library off the network",
        "--offline;",
    ),
    (
        Status.REFUSED,
        "positions are scaled as the file says; change config.json and convert again",
        """
        --rope-scaling TYPE; --rope-scale N; --rope-freq-base N =0; --rope-freq-scale N;
        --yarn-orig-ctx N =0; --yarn-ext-factor N =-1; --yarn-attn-factor N =-1;
        --yarn-beta-slow N =-1; --yarn-beta-fast N =-1; -gan --grp-attn-n N =1;
        -gaw --grp-attn-w N;
        """,
    ),
    (
        Status.REFUSED,
        "the file's metadata counts as it is",
        "--override-kv KEY=TYPE:VALUE;",
    ),
    (
        Status.REFUSED,
        "orthrus-inspect --verify FILE.gguf checks every byte",
        "--check-tensors;",
    ),
    (
        Status.REFUSED,
        "merge the adapter into the checkpoint, and convert that",
        """
        --lora FNAME; --lora-scaled FNAME:SCALE; --lora-init-without-apply;
        --control-vector FNAME; --control-vector-scaled FNAME:SCALE;
        --control-vector-layer-range START END;
        """,
    ),
    (
        Status.REFUSED,
        "the text ends at the end of the context; raise -c",
        "--context-shift; --keep N =0;",
    ),
    (
        Status.ACCEPTED,
        "the text ends at the end of the context anyway",
        "--no-context-shift;",
    ),
    (
        Status.REFUSED,
        "use --temp, --top-k, --top-p, --min-p and the penalties, in llama.cpp's own order",
        """
        --samplers SAMPLERS; --sampler-seq --sampling-seq SEQUENCE;
        --top-nsigma --top-n-sigma N =-1; --xtc-probability N =0; --xtc-threshold N =1;
        --typical --typical-p N =1; --dry-multiplier N =0; --dry-base N; --dry-allowed-length N;
        --dry-penalty-last-n N =0; --dry-sequence-breaker STRING; --adaptive-target N =-1;
        --adaptive-decay N; --dynatemp-range N =0; --dynatemp-exp N =1; --mirostat N =0;
        --mirostat-lr N; --mirostat-ent N; -l --logit-bias TOKEN_ID±BIAS;
        """,
    ),
    (
        Status.REFUSED,
        "the command line cannot constrain the text; the engine can (engine.Request.constraint)",
        """
        --grammar GRAMMAR; --grammar-file FNAME; -j --json-schema SCHEMA;
        -jf --json-schema-file FILE;
        """,
    ),
    (
        Status.REFUSED,
        "the file's own template is used; --raw goes without it",
        """
        --chat-template TEMPLATE; --chat-template-file FILE; --chat-template-kwargs JSON;
        --skip-chat-parsing --no-skip-chat-parsing; --in-prefix-bos; --in-prefix STRING;
        --in-suffix STRING;
        """,
    ),
    (
        Status.REFUSED,
        "--think and --no-think switch thinking, where the file's template can",
        """
        --reasoning-format FORMAT =none; --reasoning-effort LEVEL =default;
        --reasoning-budget N =-1; --reasoning-budget-message MESSAGE;
        --reasoning-preserve --no-reasoning-preserve;
        """,
    ),
    (
        Status.REFUSED,
        "special tokens are not printed; --json shows the ids of all",
        "-sp --special; --verbose-prompt;",
    ),
    (
        Status.REFUSED,
        "redirect the streams instead: > FILE for the text, 2> FILE for everything else",
        "-o --output --output-file FNAME; --log-file FNAME; --log-prompts-dir PATH;",
    ),
    (
        Status.REFUSED,
        "prompts are UTF-8 text: -p TEXT or -f FILE",
        "-bf --binary-file FNAME;",
    ),
    (
        Status.REFUSED,
        "a prompt's rows are kept within a chat, not between runs",
        "--prompt-cache FNAME; --prompt-cache-all; --prompt-cache-ro;",
    ),
    (
        Status.REFUSED,
        "only text goes in: there is no projector for images or sound",
        """
        -mm --mmproj FILE; -mmu --mmproj-url URL; -mmdev --mmproj-device DEVICE;
        --image --audio --video FILE; --image-min-tokens N; --image-max-tokens N;
        --mtmd-batch-max-tokens N; --video-fps N; --video-timestamp-interval N;
        --video-ffmpeg-dir DIR; --media-path PATH; -hfv -hfrv --hf-repo-v REPO;
        -hffv --hf-file-v FILE;
        """,
    ),
    (
        Status.ACCEPTED,
        "only text goes in: no projector is looked for",
        "--mmproj-auto --no-mmproj --no-mmproj-auto; --mmproj-offload --no-mmproj-offload;",
    ),
    (
        Status.REFUSED,
        "drafts come from the model's own heads (--heads for a split model) or from --drafter; see "
        "--strategy and --draft-width",
        """
        -hfd -hfrd --hf-repo-draft --spec-draft-hf REPO;
        -td --threads-draft --spec-draft-threads N;
        -tbd --threads-batch-draft --spec-draft-threads-batch N;
        -Cd --cpu-mask-draft --spec-draft-cpu-mask M;
        -Crd --cpu-range-draft --spec-draft-cpu-range LO-HI;
        --cpu-strict-draft --spec-draft-cpu-strict 0|1; --prio-draft --spec-draft-prio N;
        --poll-draft --spec-draft-poll 0|1;
        -Cbd --cpu-mask-batch-draft --spec-draft-cpu-mask-batch M;
        --cpu-strict-batch-draft --spec-draft-cpu-strict-batch 0|1;
        --prio-batch-draft --spec-draft-prio-batch N;
        --poll-batch-draft --spec-draft-poll-batch 0|1;
        -otd --override-tensor-draft --spec-draft-override-tensor PATTERN=TYPE;
        -cmoed --cpu-moe-draft --spec-draft-cpu-moe;
        -ncmoed --n-cpu-moe-draft --spec-draft-n-cpu-moe --spec-draft-ncmoe N;
        -devd --device-draft --spec-draft-device DEV;
        -ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-ngl N;
        -ctkd --cache-type-k-draft --spec-draft-type-k TYPE;
        -ctvd --cache-type-v-draft --spec-draft-type-v TYPE; --spec-draft-n-max N;
        --spec-draft-n-min N; --spec-draft-p-split --draft-p-split P;
        --spec-draft-p-min --draft-p-min P;
        --spec-draft-backend-sampling --no-spec-draft-backend-sampling;
        --spec-draft-sampling MODE; --spec-synth-len L; --spec-synth-rates P0,P1,…;
        --spec-type TYPES =none; --spec-default; --draft --draft-n --draft-max N;
        --draft-min --draft-n-min N;
        """,
    ),
    (
        Status.REFUSED,
        "--lookup drafts what followed the same words before, in the text so far",
        """
        --spec-ngram-mod-n-min N; --spec-ngram-mod-n-max N; --spec-ngram-mod-n-match N;
        --spec-ngram-simple-size-n N; --spec-ngram-simple-size-m N;
        --spec-ngram-simple-min-hits N; --spec-ngram-map-k-size-n N; --spec-ngram-map-k-size-m N;
        --spec-ngram-map-k-min-hits N; --spec-ngram-map-k4v-size-n N;
        --spec-ngram-map-k4v-size-m N; --spec-ngram-map-k4v-min-hits N; --spec-ngram-size-n N;
        --spec-ngram-size-m N; --spec-ngram-min-hits N; -lcs --lookup-cache-static FNAME;
        -lcd --lookup-cache-dynamic FNAME;
        """,
    ),
    (
        Status.REFUSED,
        "this command is no server, and knows none",
        """
        --server-base URL; --host HOST; --port PORT; --reuse-port; --path PATH;
        --cors-origins ORIGINS; --cors-methods METHODS; --cors-headers HEADERS;
        --cors-credentials --no-cors-credentials; --api-prefix PREFIX;
        --ui-config --webui-config JSON; --ui-config-file --webui-config-file PATH;
        --ui-mcp-proxy --webui-mcp-proxy --no-ui-mcp-proxy --no-webui-mcp-proxy;
        --ui --webui --no-ui --no-webui; --tools TOOLS; --tools-runtime OPTION;
        --mcp-servers-config PATH; --mcp-servers-json JSON; -ag --agent -no-ag --no-agent;
        -a --alias STRING; --tags STRING; --api-key KEY; --api-key-file FNAME;
        --ssl-key-file FNAME; --ssl-cert-file FNAME; -to --timeout N; --sse-ping-interval N;
        --threads-http N; --metrics; --props; --slots --no-slots; --slot-save-path PATH;
        -sps --slot-prompt-similarity SIMILARITY; --models-dir PATH; --models-preset PATH;
        --models-max N; --models-autoload --no-models-autoload;
        --prefill-assistant --no-prefill-assistant; --sleep-idle-seconds SECONDS;
        """,
    ),
    (
        Status.REFUSED,
        "text is all that comes out: no embeddings, no ranks, no infilling",
        """
        --embedding --embeddings; --embd-normalize N; --pooling TYPE; --rerank --reranking;
        --spm-infill;
        """,
    ),
    (
        Status.REFUSED,
        "there is no completion script; --help lists the flags",
        "--completion-bash;",
    ),
)
