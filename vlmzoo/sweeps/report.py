"""stub"""
def render(*a): return "x"
