"""Visual instruction data from captions and boxes: a teacher that reads text, a journal, and a gate for its answers.

Source: Liu et al., Visual Instruction Tuning (2023), section 3.
"""
