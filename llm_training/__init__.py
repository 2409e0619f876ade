"""The rooms behind `train_llm.py`: one file, or one small folder, a concern."""
