"""The training texts of nano-colbert: what is said in several languages, from permissive sources.

`sources` names packages, licences and the split; `catalogs`, `cldr` and `frames` read and make
texts; `build` puts them together. Nothing here needs torch.
"""
