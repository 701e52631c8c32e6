"""The index in Redis or Valkey. Each part knows only those that are named before it:

- what it looks like there, no I/O: `url`, `layout`, `scripts`, `records`, `log`;
- the connection: `store` for one server, `cluster` for many, `opening` for either;
- questions: `reader`; which builder follows which pods: `leases`;
- what a builder knows: `writer` has what is due, `standing` what Redis has of its sources, `builder` both;
- what it puts behind what is due: `changes` of ledgers, records for the `directory`;
- what it asks of Redis at once: `ownership`, then `resuming` and `rewriting` of whole sources, the `sweep`;
- when it does all that: `flushing`;
- the whole: `index`.
"""
