package main

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/usage"
)

func TestWords(t *testing.T) {
	for line, c := range map[string]struct {
		kind  wordsFor
		want  string // flags, then Src and Dst, then Export
		fails string
	}{
		"server=esxi|user=root|password=+/tmp/pw|thumbprint=xx:yy|vm=moref=2|[ds] a/a.vmdk|out.raw": {
			kind: wordsForTwoDisks, want: "--server=esxi --user=root --password=+/tmp/pw --thumbprint=xx:yy --vm=moref=2|[ds] a/a.vmdk|out.raw|"},
		"file=[ds] a/a.vmdk|server=esxi|out.raw":              {kind: wordsForTwoDisks, want: "--server=esxi|[ds] a/a.vmdk|out.raw|"},
		"out.raw|server=esxi|file=[ds] a/a.vmdk":              {kind: wordsForTwoDisks, want: "--server=esxi|[ds] a/a.vmdk|out.raw|"},
		"libdir=/opt/vddk|/vm.vmdk|./x=y":                     {kind: wordsForTwoDisks, want: "--libdir=/opt/vddk|vddk:/vm.vmdk|./x=y|"},
		"server=h|file=/vmfs/volumes/ds/vm.vmdk|-":            {kind: wordsForTwoDisks, want: "--server=h|vddk:/vmfs/volumes/ds/vm.vmdk|-|"},
		"server=a|server=b|/x|o":                              {kind: wordsForTwoDisks, want: "--server=a --server=b|vddk:/x|o|"},
		"single-link=yes|unbuffered=0|vimapiver=6.5|/x":       {want: "--single-link=true --unbuffered=false|vddk:/x||"},
		"config=c|cookie=k|compression=zlib|nfchostport=1|/x": {want: "--config=c --cookie=k --compression=zlib --nfchostport=1|vddk:/x||"},
		"port=1|snapshot=s|transports=a:b|/x":                 {want: "--port=1 --snapshot=s --transports=a:b|vddk:/x||"},
		"password=|/x":                                        {want: "--password=|vddk:/x||"},
		"password=a=b=c d|/x":                                 {want: "--password=a=b=c d|vddk:/x||"},
		"[ds] a=b/c.vmdk|server=h":                            {want: "--server=h|[ds] a=b/c.vmdk||"},
		"server=h|[ds]a.vmdk":                                 {want: "--server=h|vddk:[ds]a.vmdk||"},
		"server=h":                                            {want: "--server=h|vddk:||"},
		"server=h|out":                                        {kind: wordsForTwoDisks, want: "--server=h|vddk:|out|"},
		"server=h|export=[ds] *.vmdk":                         {kind: wordsForExport, want: "--server=h|||[ds] *.vmdk"},
		"libdir=/x|user=u":                                    {kind: wordsForLibrary, want: "--libdir=/x --user=u|||"},

		"export=*|/x":            {fails: "only the command export"},
		"create=1|/x":            {fails: "create= is not supported, because vddkcp does not create"},
		"create-size=1G|/x":      {fails: "create-size= is not supported"},
		"passwrd=hunter2|/x":     {fails: "passwrd= is not a parameter of nbdkit-vddk-plugin; did you mean password=?"},
		"Server=h|/x":            {fails: "did you mean server=?"},
		"thumb-print=h|/x":       {fails: "did you mean thumbprint=?"},
		"fiel=h|/x":              {fails: "did you mean file=?"},
		"single-link=maybe|/x":   {fails: `single-link=: value "maybe": want true or false`},
		"server=h|user=u":        {kind: wordsForTwoDisks, fails: "the target DST is missing"},
		"server=h|/x|/y|o":       {kind: wordsForTwoDisks, fails: "more than one disk is given: /x, /y"},
		"server=h|file=/x|/y|o":  {kind: wordsForTwoDisks, fails: "more than one disk is given: /y, /x"},
		"server=h|/x|/y":         {fails: "more than one disk is given: /x, /y"},
		"server=h|vm:web01#1|o":  {kind: wordsForTwoDisks, fails: "vm:web01#1: the name of a VM cannot stand among KEY=VALUE words"},
		"server=h|file=vm:web01": {fails: "vm:web01: the name of a VM cannot stand among KEY=VALUE words"},
		"server=h|vm:":           {fails: "vm:: the name of a VM"},
		"password=hunter2|x.y=1": {fails: "x.y= is not a parameter"},
	} {
		t.Run(line, func(t *testing.T) {
			w, err := parseWords(strings.Split(line, "|"), c.kind)
			if c.fails != "" {
				var wrong *usage.Error
				if !errors.As(err, &wrong) || !strings.Contains(err.Error(), c.fails) {
					t.Fatalf("%+v, %v; want a usage error with %q", w, err, c.fails)
				}
				if strings.HasSuffix(err.Error(), ", ") {
					t.Errorf("%q: the list ends with an empty name", err)
				}
				if strings.Contains(err.Error()+wrong.Hint(), "hunter2") {
					t.Errorf("%v tells a value", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(w.Flags, " ") + "|" + w.Src + "|" + w.Dst + "|" + w.Export; got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestRewriteWords(t *testing.T) {
	for line, c := range map[string]struct{ want, fails string }{
		// Without words a line stays as it is.
		"a.vmdk|b.raw|--force":                   {want: "a.vmdk|b.raw|--force"},
		"--server|a=b|a.vmdk|b.raw":              {want: "--server|a=b|a.vmdk|b.raw"},
		"-D|vddk.stats=1|a.vmdk|b.raw":           {want: "-D|vddk.stats=1|a.vmdk|b.raw"},
		"--unknown|server=x|b.raw":               {want: "--unknown|server=x|b.raw"},
		"./a=b|out":                              {want: "./a=b|out"},
		"thumbprint|a=b":                         {want: "thumbprint|a=b"},
		"":                                       {want: ""},
		"server=h|--force|/x|-v|out":             {want: "copy|--force|-v|--server=h|--|vddk:/x|out"},
		"copy|server=h|/x|out":                   {want: "copy|--server=h|--|vddk:/x|out"},
		"--password|-3|server=h|/x|out":          {want: "copy|--password|-3|--server=h|--|vddk:/x|out"},
		"server=h|--password|-|/x|-":             {want: "copy|--password|-|--server=h|--|vddk:/x|-"},
		"server=h|-vD|vddk.stats=1|/x|out":       {want: "copy|-vD|vddk.stats=1|--server=h|--|vddk:/x|out"},
		"server=h|-Dvddk.stats=1|/x|out":         {want: "copy|-Dvddk.stats=1|--server=h|--|vddk:/x|out"},
		"server=h|--digest|/x|out":               {want: "copy|--digest|--server=h|--|vddk:/x|out"},
		"server=h|--|--strange|out":              {want: "copy|--server=h|--|vddk:--strange|out"},
		"info|server=h|/x|--json":                {want: "info|--json|--server=h|--|vddk:/x"},
		"map|server=h|[ds] x":                    {want: "map|--server=h|--|[ds] x"},
		"verify|server=h|/x|out":                 {want: "verify|--server=h|--|vddk:/x|out"},
		"verify|--digest|abc|server=h|/x":        {want: "verify|--digest|abc|--server=h|--|vddk:/x"},
		"vddk|--dump-plugin|libdir=/l|user=u|/x": {want: "vddk|--dump-plugin|--libdir=/l"},
		"a.vmdk|server=h":                        {want: "copy|--server=h|--|vddk:|a.vmdk"},
		"a=b|out":                                {fails: "a= is not a parameter"},
		"in|a=b":                                 {fails: "a= is not a parameter"},
	} {
		t.Run(line, func(t *testing.T) {
			var c2 cli
			parser, err := newParser(&c2, io.Discard, io.Discard, func(int) {})
			if err != nil {
				t.Fatal(err)
			}
			got, err := rewriteWords(parser.Model, strings.Split(line, "|"))
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Fatalf("%q, %v; want %q", got, err, c.fails)
				}
				return
			}
			if err != nil || strings.Join(got, "|") != c.want {
				t.Errorf("%v\ngot  %s\nwant %s", err, strings.Join(got, "|"), c.want)
			}
		})
	}
}

func FuzzWords(f *testing.F) {
	f.Fuzz(func(t *testing.T, line string, kind int) {
		w, err := parseWords(strings.Split(line, "|"), wordsFor(kind))
		if err != nil {
			return
		}
		if w.Dst != "" && wordsFor(kind) != wordsForTwoDisks {
			t.Errorf("%q: a target %q", line, w.Dst)
		}
		for _, flag := range w.Flags {
			if name, _, ok := strings.Cut(flag, "="); !ok || !strings.HasPrefix(name, "--") {
				t.Errorf("%q: %q is no flag with a value", line, flag)
			}
		}
	})
}
