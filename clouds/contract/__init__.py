"""What a cloud must do. The docstrings are the contract; one suite of tests runs it against every provider,
fakes included.

All methods are synchronous (boto3 is; activities run them on threads), safe to call from several
threads, and safe to call again with the same arguments: a lost answer is the normal case.
"""
