package address

import (
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/usage"
)

func TestForeign(t *testing.T) {
	for a, hint := range map[string]string{
		"https://example.com/disk.img": "nbdkit curl",
		"HTTP://example.com/disk.img":  "download it",
		"ftp://h/x":                    "download it",
		"s3://bucket/key":              "download it",
		"ssh://h/x":                    "ssh HOST cat FILE | vddkcp - DST",
		"vi://vc/dc/vm":                `write "[DATASTORE] DIR/DISK.vmdk" with --server`,
		"vpx://root@vc/dc/host":        `write "[DATASTORE]`,
		"esx://h":                      `write "[DATASTORE]`,
		"file:///a/b c":                "write /a/b c;",
		"file://localhost/a":           "write /a;",
		"file:a":                       "write a;",
		"json:{\"driver\":\"nbd\"}":    "qemu-nbd",
		"fat:rw:/dir":                  "qemu-nbd",
		"rbd:pool/image":               "rbd map",
		"nbd:localhost:10809":          "nbd://HOST:PORT",
		"iscsi://h/iqn/0":              "NBD URI",
		"any+thing.else-2://x":         "NBD URI",
		"[ds]x.vmdk":                   `write "[ds] x.vmdk"`,
		"[ds (1)]vm/vm.VMDK":           `write "[ds (1)] vm/vm.VMDK"`,
		"disk.img":                     "",
		"/a://b":                       "",
		"./https://x":                  "",
		"./[ds]x.vmdk":                 "",
		"[ds]x.raw":                    "",
		"[ds]":                         "",
		"[a/b]x.vmdk":                  "",
		"host:disk.img":                "",
		"a b://c":                      "",
		"1:/x":                         "",
		"jsonfile":                     "",
		"":                             "",
		"C:\\VMs\\x.vmdk":              "",
		"backup[2024]x.vmdk":           "",
	} {
		for _, role := range []Role{Source, Target} {
			err := foreign(a, role)
			if (err != nil) != (hint != "") {
				t.Errorf("%q: %v", a, err)
				continue
			}
			if err == nil {
				continue
			}
			got := err.(*usage.Error).Hint()
			if !strings.HasPrefix(err.Error(), a+": ") || !strings.HasSuffix(got, "; a file of that name is ./"+a) || role == Source && !strings.Contains(got, hint) || strings.Contains(got, "%s") {
				t.Errorf("%q: %v; %s, want %q", a, err, got, hint)
			}
		}
	}
}
