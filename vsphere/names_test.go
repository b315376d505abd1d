package vsphere

import (
	"fmt"
	"strings"
	"testing"
)

func TestEncodeName(t *testing.T) {
	for name, encoded := range map[string]string{
		"web01": "web01", "a/b": "a%2fb", `a\b`: "a%5cb", "100%": "100%25", "%2f": "%252f", "ü [x] '\"": "ü [x] '\"", "": "",
	} {
		if got := encodeName(name); got != encoded {
			t.Errorf("encodeName(%q) = %q, want %q", name, got, encoded)
		}
		if got := decodeName(encoded); got != name {
			t.Errorf("decodeName(%q) = %q, want %q", encoded, got, name)
		}
	}
	if got := decodeName("%2F%5C%20%"); got != `/\%20%` {
		t.Errorf("decodeName = %q", got)
	}
}

// testPlace returns the place of a VM. The names of the path are separated by "|", and the name of
// the datacenter begins with "!".
func testPlace(path string) *place {
	p := &place{center: -1}
	for i, name := range strings.Split(path, "|") {
		if strings.HasPrefix(name, "!") {
			p.center, name = i, name[1:]
		}
		p.path = append(p.path, name)
		p.name = name
	}
	return p
}

func TestPlace(t *testing.T) {
	for _, test := range []struct{ path, full, folder string }{
		{"!DC|vm|web", "/DC/vm/web", ""},
		{"!DC|vm|prod|a/b|web", "/DC/vm/prod/a%2fb/web", "prod/a%2fb"},
		{"EU|!DC|vm|prod|web", "/EU/DC/vm/prod/web", "prod"},
		{"web", "/web", ""},
		{"prod|web", "/prod/web", "prod"},
	} {
		if p := testPlace(test.path); p.String() != test.full || p.folder() != test.folder {
			t.Errorf("%s: path %s, folder %s; want %s, %s", test.path, p, p.folder(), test.full, test.folder)
		}
	}
}

func TestChoose(t *testing.T) {
	places := []*place{
		0:  testPlace("!DC1|vm|web01"),
		1:  testPlace("!DC1|vm|prod|web02"),
		2:  testPlace("!DC1|vm|prod|WEB03"),
		3:  testPlace("EU|!DC2|vm|prod|web02"),
		4:  testPlace("!DC1|vm|a/b"),
		5:  testPlace("!DC1|vm|a|b"),
		6:  testPlace("!DC1|vm|100%"),
		7:  testPlace(`!DC1|vm|x\y`),
		8:  testPlace("!DC1|vm|web[1]"),
		9:  testPlace("!DC1|vm|Web01 copy"),
		10: testPlace("!DC1|vm|%2f"),
		11: testPlace("!DC1|vm|prod|deep|web04"),
		12: testPlace("!DC1|vm|lost*"),
		13: testPlace("!DC1|vm|lost1"),
		14: testPlace("!DC1|vm|twin"),
		15: testPlace("!DC1|vm|TWIN"),
		16: testPlace("orphan"),
	}
	for _, test := range []struct {
		text string
		find string // indexes that Find chooses
		list string // indexes that List chooses; "": the same
	}{
		{text: "web01", find: "0"},
		{text: "WEB01", find: "0"},
		{text: "web03", find: "2"},
		{text: "web02", find: "1 3"},
		{text: "web", find: "none"},
		{text: "web*", find: "none", list: "0 1 2 3 8 9 11"},
		{text: "WEB0?", find: "none", list: "0 1 2 3 11"},
		{text: "web0[1-2]", find: "none", list: "0 1 3"},
		{text: "web[1]", find: "8"},
		{text: "web\\[1\\]", find: "none", list: "8"},
		{text: "/DC1/vm/web01", find: "0"},
		{text: "DC1/vm/web01", find: "0"},
		{text: "/dc1/VM/Web01", find: "0"},
		{text: "vm/web01", find: "0"},
		{text: "/web01", find: "0"},
		{text: "prod/web02", find: "1 3"},
		{text: "/DC1/vm/prod/web02", find: "1"},
		{text: "/EU/DC2/vm/prod/web02", find: "3"},
		{text: "/DC2/vm/prod/web02", find: "3"},
		{text: "/DC1/prod/web02", find: "none"},
		{text: "/DC1/vm/prod/*", find: "none", list: "1 2"},
		{text: "/*/vm/prod/web02", find: "none", list: "1 3"},
		{text: "prod/*/*", find: "none", list: "11"},
		{text: "a/b", find: "4 5"},
		{text: "a%2fb", find: "4"},
		{text: "A%2FB", find: "4"},
		{text: "/DC1/vm/a%2fb", find: "4"},
		{text: "/DC1/vm/a/b", find: "5"},
		{text: "a?b", find: "none", list: "4"},
		{text: "a*", find: "none", list: "4"},
		{text: "100%", find: "6"},
		{text: "100%25", find: "6"},
		{text: `x\y`, find: "7"},
		{text: "x%5cy", find: "7"},
		{text: "%2f", find: "10"},
		{text: "%252f", find: "10"},
		{text: "lost*", find: "12"},
		{text: "twin", find: "14"},
		{text: "Twin", find: "14 15"},
		{text: "/orphan", find: "16"},
		{text: "[", find: "none"},
		{text: "/", find: "none"},
	} {
		q, err := parseQuery(test.text)
		if err != nil {
			t.Errorf("%q: %v", test.text, err)
		}
		if test.list == "" {
			test.list = test.find
		}
		for globs, want := range map[bool]string{false: test.find, true: test.list} {
			got := strings.Trim(fmt.Sprint(q.choose(places, globs)), "[]")
			if got == "" {
				got = "none"
			}
			if got != want {
				t.Errorf("%q, globs %v: %s, want %s", test.text, globs, got, want)
			}
		}
	}
}

func TestParseQuery(t *testing.T) {
	for text, want := range map[string]query{
		"moref=vm-16":                {moref: "vm-16"},
		"moref=VirtualMachine:vm-16": {moref: "vm-16"},
		"uuid=ABC-1":                 {uuid: "abc-1"},
		"a=b":                        {},
	} {
		want.text = text
		if got, err := parseQuery(text); err != nil || got.moref != want.moref || got.uuid != want.uuid || got.text != text || got.path != nil {
			t.Errorf("%q: %+v, error %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"moref=", "uuid="} {
		if _, err := parseQuery(text); err == nil || !strings.Contains(err.Error(), "is missing") {
			t.Errorf("%q: error %v", text, err)
		}
	}
}

func TestSplitFile(t *testing.T) {
	known := []string{"a] b", "with/slash", "a"}
	for _, test := range []struct {
		file, datastore, path string
		ok                    bool
	}{
		{"[ds1] web/web.vmdk", "ds1", "web/web.vmdk", true},
		{"[ds1]", "ds1", "", true},
		{"[ds1] ", "ds1", "", true},
		{"[a] b] c.vmdk", "a] b", "c.vmdk", true},
		{"[a] c] d.vmdk", "a", "c] d.vmdk", true},
		{"[x]] web/[1] web.vmdk", "x]", "web/[1] web.vmdk", true},
		{"[with%2fslash] a.vmdk", "with/slash", "a.vmdk", true},
		{"[with/slash] a.vmdk", "with/slash", "a.vmdk", true},
		{"[un%2fknown] a.vmdk", "un/known", "a.vmdk", true},
		{"[] a.vmdk", "", "a.vmdk", true},
		{"/vmfs/volumes/ds1/a.vmdk", "", "", false},
		{"[ds1", "", "", false},
		{"", "", "", false},
	} {
		if ds, path, ok := splitFile(test.file, known...); ds != test.datastore || path != test.path || ok != test.ok {
			t.Errorf("%q: %q, %q, %v; want %q, %q, %v", test.file, ds, path, ok, test.datastore, test.path, test.ok)
		}
	}
}
