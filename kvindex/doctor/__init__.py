"""`kvindex doctor`: what is wrong with a publisher, a replay socket, a service, and what to do about it.

Looking (`probe`, `service`) and judging (`judgement`, `fleet`) are apart.
"""
