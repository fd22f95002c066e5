"""Docstrings are whole sentences: a function's begins with an imperative verb, and none begins with a fragment."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_deepseek"
FOLDERS = (".", *sorted(path.name for path in PACKAGE.iterdir() if any(path.glob("**/*.py"))))
VERBS = frozenset("""
    Abort Accept Accumulate Acquire Act Adapt Add Adopt Advance Align Allocate Allow Announce Answer Append Apply
    Arrange Ask Assemble Assert Assign Attach Attend Average Await Backpropagate Balance Be Begin Bind Blend Block
    Break Bring Broadcast Build Cache Calculate Call Cancel Carry Cast Catch Change Check Choose Claim Clear Clip
    Close Collect Combine Communicate Compare Complete Compress Compute Concatenate Configure Confirm Connect
    Consume Continue Contribute Convert Copy Correct Count Cover Create Cut Deal Decide Declare Decode Decompress
    Define Delay Delete Deliver Dequantise Dequantize Derive Describe Destroy Detach Detect Determine Differentiate
    Disable Discard Disconnect Dispatch Display Distribute Divide Do Download Draw Drop Dump Echo Embed Emit Empty
    Enable Encode End Ensure Enter Escape Estimate Evaluate Exchange Exclude Execute Exit Expand Expect Explain
    Export Expose Express Extend Extract Fail Feed Fetch Fill Find Finish Fit Fix Flush Fold Follow Forget Format
    Forward Free Freeze Fuse Gather Generate Get Give Go Group Guard Guess Halt Handle Hash Hide Hold Identify
    Ignore Implement Import Include Index Infer Initialise Initialize Insert Inspect Install Interleave Interpret
    Invert Issue Iterate Join Keep Launch Lay Lead Leave Let Limit Link List Listen Load Locate Lock Log Look Lower
    Make Map Mark Mask Match Materialise Materialize Measure Merge Mix Move Multiply Name Normalise Normalize Note
    Notice Obtain Offer Offload Omit Open Order Overlap Overwrite Own Pack Pad Pair Parse Partition Pass Pause
    Permute Pin Place Plan Plot Point Post Predict Prepare Preserve Pretend Prevent Print Probe Process Produce
    Profile Project Promise Propagate Prove Publish Pull Push Put Quantise Quantize Queue Quote Raise Reach Read
    Rebuild Receive Recompute Reconstruct Record Recover Reduce Refuse Register Reject Relay Release Reload Remember
    Remove Rename Render Renew Reorder Repeat Replace Replay Replicate Report Request Require Reserve Reset Reshape
    Reshard Resolve Restore Resume Retry Return Reverse Rewrite Rotate Round Route Run Sample Sanitise Sanitize Save
    Say Scale Scan Scatter Schedule Score Search See Select Send Separate Serialise Serialize Serve Set Settle Shard
    Share Shift Show Shuffle Shut Sign Signal Silence Skip Slice Snapshot Sort Spawn Split Spread Stack Start State
    Step Stop Store Stream Strip Substitute Subtract Sum Summarise Summarize Survive Suspend Swap Switch Sync
    Synchronise Synchronize Take Tell Terminate Test Throw Time Toggle Tokenise Tokenize Touch Trace Track Train
    Transform Translate Transpose Trap Treat Trim Trust Try Tune Turn Undo Unflatten Unfreeze Unite Unlock Unpack
    Unpad Unroll Unshard Unwrap Update Use Validate Vary Verify View Visit Wait Wake Walk Warm Warn Watch Weigh
    Weight Widen Wrap Write Yield Zero
""".split())
FRAGMENTS = ("Also", "As", "By", "If", "In which", "Of", "So", "To", "What of", "Whether", "Which", "Whose", "Why")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def faults(text: str, is_function: bool) -> Iterator[str]:
    """What is wrong with a docstring, each fault in a few words."""
    begins, follows = [*text.split(), ""][:2]
    if is_function and (begins.rstrip(",") not in VERBS or (begins in VERBS and follows == "of")):  # "Sum of ..."
        yield f"begins with {begins + ' ' + follows!r}, which is no imperative verb"
    if not is_function and re.match(rf"({'|'.join(FRAGMENTS)})\b", text):
        yield f"begins with the fragment {begins!r}"
    first = text.split("\n\n")[0].rstrip()
    if not first.endswith((".", "?", ".)", '."', ":")):
        yield f"its first paragraph ends with {first[-1]!r}, neither a full stop nor a colon before a list"
    elif first.endswith(":") and first == text.rstrip():
        yield "ends with a colon, and no list follows"


def offenders(source: str, path: str) -> Iterator[str]:
    """A line for each fault of a docstring: the file, the line, the name and what is wrong."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            name, line = getattr(node, "name", "(module)"), getattr(node, "lineno", 1)
            for fault in faults(ast.get_docstring(node), isinstance(node, FUNCTIONS)):
                yield f"{path}:{line} {name} {fault}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_whole_sentences(folder):
    paths = sorted(PACKAGE.glob("*.py") if folder == "." else (PACKAGE / folder).glob("**/*.py"))
    found = [line for path in paths for line in offenders(path.read_text(), path.relative_to(PACKAGE.parent))]
    assert not found, "\n".join([f"{len(found)} docstrings:", *found])


def test_the_verbs_are_in_order():
    listed = re.findall(r"[A-Z]\w+", Path(__file__).read_text().split('"""')[3])
    assert listed == sorted(set(listed))


@pytest.mark.parametrize("docstring, fault", [
    ("The sum of x.", "no imperative verb"), ("Whether x is so.", "no imperative verb"),
    ("Sum of all x.", "no imperative verb"), ("Return the sum", "full stop"),
    ("Return one of:", "no list follows")])
def test_a_fault_is_found(docstring, fault):
    (line,) = offenders(f'def total(x):\n    """{docstring}"""\n', "a.py")
    assert line.startswith("a.py:1 total ") and fault in line


def test_a_whole_sentence_has_no_fault():
    good = '"""A title."""\nclass A:\n    """A pair."""\n    def f(x):\n        """Return x."""'
    assert not list(offenders(good, "a.py"))
    (line,) = offenders('class Rows:\n    """Of a batch, the rows."""\n', "a.py")
    assert "the fragment 'Of'" in line
