package vddk

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

func TestErrors(t *testing.T) {
	for _, test := range []struct {
		e         Error
		want      string // a part of the message
		hint      string // a part of the hint; "" if there is none
		permanent bool
	}{
		{Error{Op: "read", Func: "VixDiskLib_ReadAsync", Disk: "[ds] a b/c.vmdk", Off: 1 << 20, Len: 512, Code: 0x3e8000000e86, Text: "Lost"},
			"VDDK: read [ds] a b/c.vmdk [1048576, 1049088): VixDiskLib_ReadAsync: error 3718 (0x3e8000000e86): Lost", "", false},
		{Error{Op: "open", Disk: "D", Code: 1, Text: "Unknown error", Last: []string{"one", "NBD: two"}},
			`VDDK: open D: error 1: Unknown error; last log line: "NBD: two"`, "", false},
		{Error{Op: "open", Disk: "D", Code: 1, Text: "Unknown error", Last: []string{"x: actual thumbprint=AA:BB expected=CC:DD", "more"}},
			"has the thumbprint AA:BB, expected CC:DD", "--thumbprint", false},
		{Error{Op: "open", Disk: "D", Code: 1, Last: []string{"SSL: thumbprint mismatch"}}, "error 1", "--thumbprint", false},
		{Error{Op: "open", Disk: "D", Code: 2, Text: "Memory"}, "error 2", "maxMemory", false},
		{Error{Op: "read", Disk: "D", Code: 1, Last: []string{"received NFC error 5 from server: Failed to allocate the requested 1048600 bytes"}}, "error 1", "hostd/config.xml", false},
		{Error{Op: "open", Disk: "D", Code: 1, Last: []string{"libssl.so.3: cannot open shared object file"}}, "", "8.0.1", false},
		{Error{Op: "open", Disk: "D", Code: 1, Last: []string{"GetFileName: Cannot create disk spec"}}, "", "independent", false},
		{Error{Op: "open", Disk: "D", Code: 13, Last: []string{"FileLockCreateEntryDirectory creation failure on '/x.lck': Permission denied"}}, "", "read-only", false},
		{Error{Op: "open", Disk: "D", Code: 1, Last: []string{"Host address lookup for server esx1 failed: Name or service not known"}}, "", "resolve", false},
		{Error{Op: "open", Disk: "D", Code: 1, Last: []string{"NBD_ClientOpen: attempting to create connection to vpxa", "NBD_ClientOpen: attempting to create connection to vpxa", "NBD_ClientOpen: attempting to create connection to vpxa"}}, "", "902", false},
		{Error{Op: "open", Disk: "D", Code: 13, Last: []string{"NBD_ClientOpen: attempting to create connection to vpxa"}}, "", "--snapshot", false},
		{Error{Op: "read", Disk: "D", Code: 13}, "", "", false},
		{Error{Op: "open", Disk: "D", Code: 4}, "", "DATASTORE", true},
		{Error{Op: "read", Disk: "D", Code: 1, first: true}, "", "too new or too old", false},
		{Error{Op: "read", Disk: "D", Code: 1}, "", "", false},
		{Error{Op: "open", Disk: "D", Code: 14009, Text: "The server refused connection"}, "error 14009", "port 443", false},
		{Error{Op: "open", Disk: "D", Code: 3014, Text: "Cannot complete login due to an incorrect user name or password"}, "", "--user", true},
		{Error{Op: "open", Disk: "D", Code: 3014, Text: "Insufficient permissions in the host operating system"}, "", "--user", true},
		{Error{Op: "open", Disk: "D", Code: 14009, Last: []string{"cannot get thumbprint: SSL error, exception: 'Wrong X.509 Certificate'", "the session is not authenticated"}}, "error 14009", "--user", false},
		{Error{Op: "open", Disk: "D", Code: 18000, Last: []string{"SSL: 12 certificates loaded, CRL check disabled; last error 0"}}, "error 18000", "", false},
		{Error{Op: "read", Disk: "D", Code: 16, Last: []string{"vpxa: fault.NotAuthenticated: the session is not authenticated"}}, "error 16", "--user", false},
		{Error{Op: "read", Disk: "D", Code: 1, Last: []string{"cannot write /var/log/x.log: Read-only file system"}}, "error 1", "read-only", false},
		{Error{Op: "read", Disk: "D", Code: 4}, "error 4", "", false},
		{Error{Op: "open", Disk: "D", Code: 3}, "error 3", "", true},
	} {
		if got := test.e.Error(); !strings.Contains(got, test.want) {
			t.Errorf("%s, want %s", got, test.want)
		}
		wrapped := fmt.Errorf("copy: %w", source.Permanent(&test.e))
		if hint := hintOf(wrapped); !strings.Contains(hint, test.hint) || test.hint == "" && hint != "" {
			t.Errorf("%v: hint %q, want one with %q", &test.e, hint, test.hint)
		}
		if got := test.e.permanent(); got != test.permanent {
			t.Errorf("%v: permanent %v", &test.e, got)
		}
	}
	if hintOf(errors.New("another")) != "" {
		t.Error("a hint for any error")
	}
}
