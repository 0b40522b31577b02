"""`nplora embed`"""

import argparse

from nplora.cli.parser import add_any_base, given_data, path, weighted_path

HELP = "Turn the texts of a file into embeddings, with an encoder such as MiniLM."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "encoder: a Hugging Face directory or a GGUF file"
    parser.add_argument("model", metavar="MODEL", type=path, help=text)
    text = "file of texts: .jsonl, .csv, .tsv, .parquet or .arrow, or .txt with a text in each line"
    parser.add_argument("data", metavar="FILE", type=weighted_path, nargs="+", help=text)
    text = "the file to write: .npy, .csv or .jsonl"
    parser.add_argument("--output", metavar="FILE", type=path, required=True, help=text)
    text = "adapter for the model: a PEFT directory"
    parser.add_argument("--adapter", metavar="DIR", type=path, help=text)
    add_any_base(parser)
    text = (
        "how the hidden states of a text become its embedding, for example mean, cls or last (default: the "
        "setting in the model's files)"
    )
    parser.add_argument("--pooling", metavar="NAME", help=text)
    text = "field that holds the text (default: text)"
    parser.add_argument("--column", metavar="NAME", default="text", help=text)
    text = (
        "scale embeddings to length 1; with --no-normalize, keep their length (default: the setting in the "
        "model's files)"
    )
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = 'prefix for each text of the file, such as "query: "'
    parser.add_argument("--prompt", metavar="TEXT", help=text)
    text = "name of a prompt in the model's files; the prompt becomes the prefix of each text"
    parser.add_argument("--prompt-name", metavar="NAME", help=text)
    text = "number of texts in a batch (default: the number that gives about 2,048 tokens)"
    parser.add_argument("--batch-size", metavar="N", type=int, help=text)
    text = "maximum number of tokens in a text; longer texts are cut (default: the model's maximum)"
    parser.add_argument("--max-length", metavar="N", type=int, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> None:
    from nplora.finetuning import embedding

    made = embedding.embed_file(
        arguments.model,
        given_data(arguments.data),
        arguments.output,
        adapter=arguments.adapter,
        any_base=arguments.any_base,
        pooling=arguments.pooling,
        column=arguments.column,
        normalize=arguments.normalize,
        prompt=arguments.prompt,
        prompt_name=arguments.prompt_name,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        overwrite=arguments.overwrite,
        progress=True,
    )
    print(made, flush=True)
