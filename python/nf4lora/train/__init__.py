"""`nf4lora train`: fine-tune a 4-bit model on your own data, from flags or a YAML file, on TRL's SFTTrainer.

A run passes through stages, and each hands its result to the next: settings, data, model, trainer, files.

    run.py        the run, from its settings to an exit code
    settings.py   every option: name, default, aliases, meaning     values.py     their parsers
    data.py       files to tokens and labels, for one run           model.py      tokenizer and model
    device.py     where it computes, in which type                  optimizer.py  which optimizer a run takes
    fit.py        training itself                                   trainer.py    what we change in SFTTrainer
    guard.py      what watches it                                   stop.py       a request to end a run early
    progress.py   the live line and metrics.jsonl                   process.py    what libraries change, put back
    banner.py     what is said at the start and at the end          plot.py       loss.png
    reach.py      which layers of a model text passes through       memory.py     peak memory
    errors.py     the two kinds of failure                          paths.py      mistyped paths, or names on the Hub

arguments/, from what a user writes to settings; nothing heavy is imported before they are checked:

    parse.py      flags and a YAML file, checked                    yaml_file.py  a YAML file as its author wrote it
    foreign.py    what other tools' keys mean here                  dependent.py  keys that need others to be understood

samples/, from files to conversations and texts:

    rows.py       files and Hub data sets to rows                   folders.py    folders of files, by split
    formats.py    rows to samples: chat, prompt, text               keys.py       keys that decide what is trained
    tools.py      tool calls and schemas in one form

chat/, from samples to tokens:

    masking.py    samples to tokens and labels                      turns.py      where answers stand in the rendering
    marks.py      the same for long conversations                   dropped.py    what a chat template leaves out
    template.py   which chat template a run takes                   processor_template.py  a processor's
    clock.py      the date that a template prints

run_folder/, the output folder:

    output.py     how a run begins there, and what it leaves        files.py      which files are a run's own
    config_file.py  config.yaml                                     checkpoints.py  what a run that goes on must keep
"""
