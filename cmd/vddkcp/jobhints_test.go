package main

import (
	"errors"
	"testing"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// TestJobTexts checks how messages of a copy read in a batch. They are those of the code.
func TestJobTexts(t *testing.T) {
	parser, err := newJobParser(new(servers))
	if err != nil {
		t.Fatal(err)
	}
	spec, err := parser.spec()
	if err != nil {
		t.Fatal(err)
	}
	texts := newJobTexts(spec)
	for _, c := range []struct{ text, want string }{
		{"x.raw: file already exists; --force replaces it", `x.raw: file already exists; "force": true replaces it`},
		{"run again with --resume to continue the copy at byte 5", "run again with --resume to continue the copy at byte 5"},
		{"run again with --force and without --resume, which drops what was copied and starts over", `run again with "force": true, which drops what was copied and starts over`},
		{"run again with --resume and --force, which replaces the file", `run again with "force": true, which replaces the file`},
		{"it is copied as a raw disk (confirm with --source-format raw)", `it is copied as a raw disk (confirm with "source_format": "raw")`},
		{"use --reflink auto, which shares what can be shared", `use "reflink": "auto", which shares what can be shared`},
		{"for a disk of 0 bytes use --size 0", `for a disk of 0 bytes use "size": 0`},
		{"name the VM of the disk with --vm moref=ID, or name it as vm:NAME#N", `name the VM of the disk with "vm": "moref=ID", or name it as vm:NAME#N`},
		{"check --user (user@domain) and the password", `check the field "user" (user@domain) and the password`},
		{"lower --connections, --request-size or --nfc-buffers", `lower the field "connections", the field "request_size" or the field "nfc_buffers"`},
		{"if you trust the image, add --allow-path '/a b' to permit it", `if you trust the image, add "allow_path": ["/a b"] to permit it`},
		{"--via: nfc cannot read this", `the field "via": nfc cannot read this`},
		{"or add --via nfc (experimental)", `or add "via": "nfc" (experimental)`},
		{"with --quiesce=try", `with "quiesce": "try"`},
		{"run vddkcp thumbprint HOST; then pass it with --thumbprint", `run vddkcp thumbprint HOST; then pass it with the field "thumbprint"`},
		{"remove it with: vddkcp cleanup --remove --older-than 0s --server HOST", "remove it with: vddkcp cleanup --remove --older-than 0s --server HOST"},
		{"the journal cannot be kept: do not use --target-is-zero in the next run", `the journal cannot be kept: do not use "target_is_zero": true in the next run`},
		{"the option --compress zlib is not valid for raw disks", `"compress": "zlib" is not valid for raw disks`},
		{"no flags here -- only dashes", "no flags here -- only dashes"},
	} {
		if got := texts.of(c.text); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.text, got, c.want)
		}
	}
	cause := errors.New("cause")
	err = texts.error(usage.WithHint(errors.Join(cause, errors.New("needs --force")), "use --force"))
	if o := report.Of(err); !errors.Is(err, cause) || err.Error() != "cause\nneeds \"force\": true" || o.Hint != `use "force": true` || o.Exit != 2 {
		t.Errorf("%q, %+v", err, o)
	}
}
