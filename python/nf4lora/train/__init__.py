"""`nf4lora train`: fine-tune a 4-bit model on your own data, from flags or a YAML file, on TRL's SFTTrainer.

A run passes through the files in this order, and nothing heavy is imported before the options are checked:

    options.py    every option: name, default, aliases, meaning     values.py    their parsers
    yaml_file.py  a YAML file as its author wrote it                config.py    flags and YAML to a TrainConfig
    foreign.py    what other tools' keys mean here                  together.py  keys that need others to be understood
    rows.py       files and Hub data sets to rows                   folders.py   folders of files, by split
    formats.py    rows to samples: chat, prompt, text               keys.py      keys that decide what is trained
    tools.py      tool calls and schemas in one form                turns.py     where answers stand in the rendering
    marks.py      the same for long conversations                   dropped.py   what a chat template leaves out
    masking.py    samples to tokens and labels                      data.py      all of that for one run
    model.py      tokenizer and model                                reach.py    which of its layers text passes through
    checkpoints.py  what a run that goes on must agree with          output.py   the output folder, folder.py its files
    fit.py        training itself                                    trainer.py  what we change in SFTTrainer
    guard.py      what watches it                                    interrupt.py  Ctrl-C and its relatives
    progress.py   the live line and metrics.jsonl                    streams.py  stdout, whatever its reader does
    banner.py     what is said at the start and at the end           plot.py     loss.png
    run.py        the run, from options to an exit code

memory.py and words.py measure memory and write numbers, errors.py holds the two kinds of failure, paths.py tells
mistyped paths from names on the Hub.
"""
