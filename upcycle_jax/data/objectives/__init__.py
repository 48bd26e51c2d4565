"""What is learnt from plain text: span corruption, prefix language modelling, UL2, language
modelling. `arithmetic` has the lengths, `preprocessors` and `tf_spans` the steps of SeqIO tasks,
`numpy` the same for cached text. Importing this package imports none of them.
"""
