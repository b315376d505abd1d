package main

import (
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestRewriteNBDKit(t *testing.T) {
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ line, want, err string }{
		// Other commands, and lines of ours.
		{line: "copy -r vddk", want: "copy -r vddk"},
		{line: "export a.raw", want: "export -- a.raw"},
		{line: "export a.raw --name n --rw", want: "export --name=n --rw -- a.raw"},
		{line: "export -v -D vddk.stats=1 --password -3 a", want: "export -v --debug=vddk.stats=1 --password=-3 -- a"},
		{line: "export --export -r=b --description -U a", want: "export --export=-r=b --description=-U -- a"},
		{line: "export -- -r --filter=x", want: "export -- -r --filter=x"},
		{line: "export -Dvddk.stats=1 -", want: "export --debug=vddk.stats=1 -- -"},
		// nbdkit's.
		{line: "export -r -f -v -U - vddk file=/a", want: "export -v --listen=unix:- -- file=/a"},
		{line: "export -rfvU s -e n -P p -t 4 vddk /a", want: "export -v --listen=unix:s --name=n --pid-file=p -- /a"},
		{line: "export -p 1 -i ::1 vddk /a", want: "export --listen=tcp://[::1]:1 -- /a"},
		{line: "export -i 0.0.0.0 /a", want: "export --listen=tcp://0.0.0.0:10809 -- /a"},
		{line: "export -p1 -Us /a", want: "export --listen=unix:s --listen=tcp://127.0.0.1:1 -- /a"},
		{line: "export --filter=retry --filter exitlast vddk /a retries=3 retry-delay=1", want: "export --exit-last --retries=3 -- /a"},
		{line: "export vddk /a minblock=1 --filter=blocksize maxdata=2M", want: "export -- /a"},
		{line: "export vddk export=x", want: "export -- export=x"},
		{line: "export a vddk", want: "export -- a vddk"},
		{line: "export vddk", want: "export"},
		{line: "export vddk port=444 -p 1", want: "export --listen=tcp://127.0.0.1:1 -- port=444"},
		{line: "export --port 444 /a", want: "export --port=444 -- /a"},
		{line: "export retries=3 /a", want: "export -- retries=3 /a"},
		// Refused command lines:
		{line: "export --filter=rate /a", err: "--filter=rate"},
		{line: "export --filter", err: "value is missing"},
		{line: "export --filter=./x.so /a", err: "--filter=./x.so"},
		{line: "export -U", err: "-U: the value is missing"},
		{line: "export -rx /a", err: "-x: vddkcp export does not accept"},
		{line: "export -n /a", err: "-n: vddkcp export does not accept"},
		{line: "export --pidfile p /a", err: "short form"},
		{line: "export --swap /a", err: "unknown flag --swap"},
		{line: "export --frob=secret /a", err: "unknown flag --frob"},
		{line: "export --name", err: "value is missing"},
		{line: "export vddk --port 1", err: "the port to listen on for nbdkit"},
		{line: "export -r --rw /a", err: "-r and --rw"},
		{line: "export -t x /a", err: "-t x"},
		{line: "export --tls-psk x /a", err: "pre-shared keys"},
	} {
		got, err := rewriteNBDKit(parser.Model, strings.Fields(c.line))
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) || report.Of(err).Exit != exit.Usage {
				t.Errorf("%s: %q, %v, want an error with %q", c.line, got, err, c.err)
			} else if strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %v", c.line, err)
			}
		case err != nil || !slices.Equal(got, strings.Fields(c.want)):
			t.Errorf("%s: %q, %v, want %s", c.line, got, err, c.want)
		}
	}
}
