"""`nf4lora train`: fine-tune a 4-bit model on your own data, from flags or a YAML file, on TRL's SFTTrainer.

A run passes through the files in this order, and nothing heavy is imported before the options are checked:

    options.py    every option: name, default, aliases, meaning     values.py    their parsers
    config.py     flags and YAML to a TrainConfig
    rows.py       files and Hub data sets to rows                    formats.py  rows to samples: chat, prompt, text
    turns.py      where the answers stand in a rendered chat         masking.py  samples to tokens and labels
    data.py       all of that for one run
    model.py      tokenizer and model                                reach.py    which of its layers text passes through
    checkpoints.py  what a run that goes on must agree with          output.py   the output folder, folder.py its files
    fit.py        training itself                                    trainer.py  what we change in SFTTrainer
    guard.py      what watches it                                    interrupt.py  Ctrl-C and its relatives
    progress.py   the live line and metrics.jsonl                    streams.py  stdout, whatever its reader does
    banner.py     what is said at the start and at the end           plot.py     loss.png
    run.py        the run, from options to an exit code

memory.py and words.py measure memory and write numbers, errors.py holds the two kinds of failure.
"""
