"""Being written by the helper who wrote zoo.py and twins.py (21:30); test_state_dict.py and test_slot.py are free for the other one."""
