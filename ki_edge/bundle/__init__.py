"""A bundle on disk: manifest, graphs, weights, witness; opened, checked, written. Imports: files."""

from .bundle import SCHEMA, Bundle, BundleWriter, DecodeVocabulary, Manifest, write_bundle
from .files import MANIFEST, sha256

__all__ = ["MANIFEST", "SCHEMA", "Bundle", "BundleWriter", "DecodeVocabulary", "Manifest", "sha256", "write_bundle"]
