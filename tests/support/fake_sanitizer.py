"""Stands in for compute-sanitizer in a rehearsal: runs the program and finds the planted fault, and nothing else."""

import subprocess
import sys

program = sys.argv[sys.argv.index("--kernel-name") + 2 :]
done = subprocess.run(program, stdout=subprocess.PIPE, text=True)
print(done.stdout)
print(f"========= ERROR SUMMARY: {int('planted' in done.stdout)} errors")
sys.exit(done.returncode)
