"""`nf4lora train`: fine-tune a 4-bit model on your own data, from flags or a YAML file, on TRL's SFTTrainer.

A run passes through the files in this order, and nothing heavy is imported before the options are checked:

    options.py    every option: name, default, aliases, meaning     config.py   flags and YAML to a TrainConfig
    rows.py       files and Hub data sets to rows                    formats.py  rows to samples: chat, prompt, text
    masking.py    samples to tokens and labels                       data.py     all of that for one run
    model.py      tokenizer and model                                trainer.py  what we change in SFTTrainer
    progress.py   the live line and metrics.jsonl                    interrupt.py  Ctrl-C
    banner.py     what is said at the start and at the end           plot.py     loss.png
    run.py        the run itself
"""
