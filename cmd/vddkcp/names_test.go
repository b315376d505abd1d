package main

import (
	"archive/tar"
	"bytes"
	wire "encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/vddk/testlib"
)

// hostile is a name that steers a terminal, forges a line, and is not UTF-8. A
// hostile line has no end of a line, and hostile XML is what XML can hold.
const (
	hostile     = "ü日\x1b]0;PWNED\a\x1b[31m\u009b1m\x7f\u202e\u2028\r\nvddkcp: FORGED\nhint: FORGED\xff\xc3"
	hostileLine = "ü日\x1b]0;PWNED\a\x1b[31m\u009b1m\x7f\u202e\u2028\xff"
	hostileXML  = "ü日&#x9b;31m&#x7f;&#x202e;&#x2028;&#10;vddkcp: FORGED&#10;"
)

// drawings are the control sequences that the progress display uses.
var drawings = regexp.MustCompile("\r|\x1b\\[[0-9]*[AKJ]|\x1b\\[\\?7[lh]")

// hostileFolder is a folder of images, archives and job files that are full of
// hostile names. The real binary runs in it.
type hostileFolder struct {
	t   *testing.T
	dir string
}

func (f *hostileFolder) write(name, content string) string {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o644); err != nil {
		f.t.Fatal(err)
	}
	return name
}

func (f *hostileFolder) descriptor(name, extra string) string {
	return f.write(name, "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n"+extra)
}

func (f *hostileFolder) qcow2(name, backing string) string {
	header := make([]byte, 104)
	copy(header, "QFI\xfb")
	wire.BigEndian.PutUint32(header[4:], 3)
	wire.BigEndian.PutUint64(header[8:], 512)
	wire.BigEndian.PutUint32(header[16:], uint32(len(backing)))
	wire.BigEndian.PutUint32(header[20:], 16)
	wire.BigEndian.PutUint64(header[24:], 1<<20)
	wire.BigEndian.PutUint32(header[36:], 1)
	wire.BigEndian.PutUint64(header[40:], 0x30000)
	wire.BigEndian.PutUint64(header[48:], 0x10000)
	wire.BigEndian.PutUint32(header[56:], 1)
	wire.BigEndian.PutUint32(header[96:], 4)
	wire.BigEndian.PutUint32(header[100:], 104)
	return f.write(name, string(header)+strings.Repeat("\x00", 512-104)+backing+strings.Repeat("\x00", 0x40000))
}

func (f *hostileFolder) archive(name string, members ...string) string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(members); i += 2 {
		h := &tar.Header{Name: members[i], Size: int64(len(members[i+1])), Mode: 0o644, Format: tar.FormatGNU}
		if err := w.WriteHeader(h); err != nil {
			f.t.Fatal(err)
		}
		if _, err := io.WriteString(w, members[i+1]); err != nil {
			f.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.t.Fatal(err)
	}
	return f.write(name, b.String())
}

// run runs vddkcp and checks everything that it printed and wrote.
func (f *hostileFolder) run(args ...string) {
	f.t.Helper()
	cmd := command(f.t, args...)
	cmd.Dir = f.dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run()
	if stdout.Len()+stderr.Len() == 0 && !strings.Contains(fmt.Sprint(args), "none") {
		f.t.Errorf("%q printed nothing: it tests nothing", args)
	}
	f.examine(fmt.Sprintf("%q: standard output", args), stdout.Bytes())
	f.examine(fmt.Sprintf("%q: standard error", args), drawings.ReplaceAll(stderr.Bytes(), nil))
	out := filepath.Join(f.dir, "out")
	err := filepath.WalkDir(out, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err == nil {
			f.examine(fmt.Sprintf("%q: %q", args, path), text)
		}
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, remove := range []string{out, filepath.Join(f.dir, "made")} {
		if err := os.RemoveAll(remove); err != nil {
			f.t.Fatal(err)
		}
		if err := os.Mkdir(remove, 0o755); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *hostileFolder) examine(what string, text []byte) {
	f.t.Helper()
	steers := func(r rune) bool {
		return r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp))
	}
	if !utf8.Valid(text) || bytes.ContainsFunc(text, steers) {
		f.t.Errorf("%s has what is not printable:\n%q", what, text)
	}
	// An end of a line in a page or in JSON is layout.
	for line := range strings.SplitSeq(string(text), "\n") {
		if forged := strings.TrimSpace(line); strings.HasPrefix(forged, "vddkcp: FORGED") || strings.HasPrefix(forged, "hint: FORGED") {
			if !strings.Contains(what, ".html") {
				f.t.Errorf("%s has a line that a name forged:\n%s", what, text)
			}
		}
	}
}

// everyCommand runs all commands that take a source.
func (f *hostileFolder) everyCommand(src string) {
	f.t.Helper()
	f.run("copy", src, "null:", "--report", "out/r.json", "--log-file", "out/text.log", "-v", "--retries", "0", "--progress", "bar")
	f.run("copy", src, "made/x.qcow2", "--verify", "--log-file", "out/json.log", "--log-format", "json", "--retries", "0", "--progress", "json")
	f.run("copy", src, "null:", "--dry-run", "-v", "--retries", "0")
	f.run("info", src, "-v", "--retries", "0")
	f.run("info", src, "--json", "--retries", "0")
	f.run("map", src, "--retries", "0")
	f.run("map", src, "--json", "--retries", "0")
	f.run("verify", src, "raw.img", "--retries", "0")
	f.run("verify", "raw.img", src, "--retries", "0", "--progress", "none")
	f.run("export", src, "--run", "echo $exportname none", "--name", "x", "--retries", "0")
	jobs, err := json.Marshal(map[string]any{"version": 1, "jobs": []any{map[string]any{"source": src, "target": "made/job.raw", "retries": 0}}})
	if err != nil {
		f.t.Fatal(err)
	}
	f.write("jobs.json", string(jobs))
	f.run("run", "jobs.json", "--state", "out/state.json", "--report", "out/r.json", "--report", "out/r.html", "--log-dir", "out/logs")
	f.run("run", "jobs.json", "--state", "made/state.json", "--check", "--probe", "1MiB")
}

// TestHostileNames checks that names of any kind cannot control a terminal or forge a
// line when vddkcp prints them or writes them to a file.
func TestHostileNames(t *testing.T) {
	f := &hostileFolder{t, t.TempDir()}
	for _, dir := range []string{"out", "made"} {
		if err := os.Mkdir(filepath.Join(f.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	raw := strings.Repeat("some bytes of a disk\n", 100<<10/20)[:100<<10]
	f.write("raw.img", raw)
	group := func(name string, do func(*hostileFolder)) {
		t.Run(name, func(t *testing.T) { do(&hostileFolder{t, f.dir}) })
	}
	group("files", func(f *hostileFolder) {
		f.everyCommand(f.write(hostile, raw))
		f.everyCommand(hostile + "missing")
		f.everyCommand(f.write(hostile+".vmdk", "KDMV"))
		f.run("copy", "raw.img", "made/"+hostile)
		f.run("copy", "raw.img", "missing/"+hostile)
		f.run("copy", "raw.img", "made/a.qcow2", "--backing", hostile+"missing")
		f.run("copy", "raw.img", "null:", "--report", "missing/"+hostile)
		f.run("copy", "raw.img", "null:", "--log-file", "missing/"+hostile)
		f.run("export", "raw.img", "--export", hostile+"=raw.img", "--run", "echo $uri")
		f.run("export", "raw.img", "--listen", "unix:missing/"+hostile)
		f.run("vddk", "--libdir", hostile)
		f.run("run", hostile)
	})
	group("words", func(f *hostileFolder) {
		for _, args := range [][]string{
			{hostile}, {"copy", "--" + hostile, "a", "b"}, {"copy", "a", "b", hostile}, {"copy", "raw.img", "null:", "--format", hostile},
			{"info", "raw.img", "--timeout", hostile}, {"export", "raw.img", "--listen", hostile}, {"thumbprint", hostile}, {"thumbprint", "127.0.0.1:" + hostile},
			{"export", "vddk", "--filter=" + hostile}, {"copy", "a.b=" + hostile, "x"}, {"copy", "raw.img", "null:", "-D", hostile},
			{"copy", "nbd://127.0.0.1:1/?" + hostile, "null:"}, {"copy", "raw.img", "nbd://" + hostile}, {"verify", "--digest", hostile, "raw.img"},
			{"run", "raw.img", "--shard", hostile}, {"run", "--merge-reports", hostile}, {"copy", "[" + hostile + "] a.vmdk", "null:"},
		} {
			f.run(args...)
		}
	})
	group("vmdk", func(f *hostileFolder) {
		f.write("flat"+hostileLine, raw)
		for _, extra := range []string{
			`RW 200 FLAT "flat` + hostileLine + "\" 0\nddb.adapterType = \"" + hostileLine + "\"\nddb.uuid=\"" + hostileLine + "\"\nddb.toolsVersion = \"" + hostileLine + "\"\nddb.virtualHWVersion = \"" + hostileLine + "\"\n",
			`RW 200 FLAT "` + hostileLine + `" 0`,
			"RW 200 " + hostileLine + ` "x" 0`,
			hostileLine + "=x\n" + hostileLine,
			"parentFileNameHint=\"" + hostileLine + "\"\nparentCID=fffffff0\nRW 200 ZERO",
			`createType="` + hostileLine + "\"\nRW 200 ZERO",
			"encoding=\"" + hostileLine + "\"\nRW 200 ZERO",
			"ddb.geometry.sectors=\"" + hostileLine + "\"\nCID=" + hostileLine + "\nRW 200 ZERO",
		} {
			f.everyCommand(f.descriptor("x.vmdk", extra))
		}
	})
	group("qcow2", func(f *hostileFolder) {
		f.everyCommand(f.qcow2("x.qcow2", hostile))
		f.everyCommand(f.qcow2("x.qcow2", f.write("base"+hostile, raw)))
	})
	group("appliances", func(f *hostileFolder) {
		envelope := func(href, id, system string) string {
			return `<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">` +
				`<References><File ovf:id="f" ovf:href="` + href + `"/></References><DiskSection><Disk ovf:diskId="` + id + `" ovf:fileRef="f" ovf:capacity="1"/>` +
				`<Disk ovf:diskId="other" ovf:fileRef="` + id + `" ovf:capacity="` + id + `"/></DiskSection>` + system + `</Envelope>`
		}
		f.everyCommand(f.write("x.ovf", envelope(hostileXML, hostileXML, "")))
		f.everyCommand(f.write("y.ovf", "<Envelope><"+hostile+">"))
		f.everyCommand("x.ovf#" + hostile)
		f.everyCommand(f.archive("x.ova", hostile+".ovf", envelope(hostileXML, hostileXML, ""), hostile, raw))
		f.everyCommand(f.archive("y.ova", "x.ovf", envelope("raw.img", hostileXML, ""), "x.mf", "SHA1("+hostileLine+")= 00\n"+hostile, "raw.img", raw))
		f.everyCommand(f.archive("z.ova", hostile, raw))
		f.everyCommand("z.ova#" + hostile)
	})
	group("nbd", func(f *hostileFolder) {
		server := "nbd://" + hostileServer(f.t)
		f.everyCommand(server)
		f.everyCommand(server + "/some")
		f.run("copy", "raw.img", server+"/some", "--retries", "0", "--report", "out/r.json")
	})
	group("batch", (*hostileFolder).batch)
	group("vddk", func(f *hostileFolder) {
		program, err := binary()
		if err != nil {
			f.t.Fatal(err)
		}
		if err := installWorker(filepath.Dir(program)); err != nil {
			f.t.Fatal(err)
		}
		lib := testlib.New(f.t)
		lib.AddDisk("[ds] a.vmdk", filepath.Join(f.dir, "raw.img"))
		lib.Conf("hostile-log", "log-reads", "transport "+hostileLine)
		f.run("copy", "--libdir", lib.Dir, "--server", "h", "--user", "u", "--password", "p", "--vm", "moref=1", "--thumbprint", strings.Repeat("ab", 20), "[ds] a.vmdk", "null:", "-v", "--report", "out/r.json")
		f.run("copy", "--libdir", lib.Dir, "--server", "h", "--user", "u", "--password", "p", "--vm", "moref=1", "--thumbprint", strings.Repeat("ab", 20), "[ds] a.vmdk", "null:", "-v", "--log-file", "out/log")
		f.run("info", "--libdir", lib.Dir, "--server", "h", "--user", hostile, "--password", "p", "--vm", "moref=1", "--thumbprint", strings.Repeat("ab", 20), "[ds] a.vmdk")
		lib.Conf(`fault Open do=fail code=1 log=\e[31m\a\x9b\nvddkcp: FORGED`)
		f.run("copy", "--libdir", lib.Dir, "--server", "h", "--user", "u", "--password", "p", "--vm", "moref=1", "--thumbprint", strings.Repeat("ab", 20), "[ds] a.vmdk", "null:", "-v", "--report", "out/r.json", "--retries", "0")
	})
}

func (f *hostileFolder) batch() {
	job := func(extra map[string]any) string {
		j := map[string]any{"name": hostile, "source": "raw.img", "target": "made/" + strings.ToValidUTF8(hostile, "")}
		for k, v := range extra {
			j[k] = v
		}
		text, err := json.Marshal(map[string]any{"version": 1, "jobs": []any{j, map[string]any{"name": "other", "source": "raw.img", "target": "made/other"}}})
		if err != nil {
			f.t.Fatal(err)
		}
		return f.write("jobs.json", string(text))
	}
	all := []string{"--state", "out/state.json", "--report", "out/r.json", "--report", "out/r.html", "--log-dir", "out/logs", "--progress", "bar"}
	hook := []string{"sh", "-c", `printf '\033[31m\a\302\2331m\342\200\256\nvddkcp: FORGED\n\377'; exit $0`}
	f.run(append([]string{"run", job(map[string]any{"labels": map[string]string{hostile: hostile}, "host": hostile, "before": append(hook, "0")})}, all...)...)
	f.run(append([]string{"run", job(map[string]any{"after": append(hook, "1")})}, all...)...)
	f.run(append([]string{"run", job(map[string]any{"before": []string{hostile}})}, all...)...)
	f.run("run", job(nil), "--check", "--probe", "1MiB", "--state", "out/state.json")
	f.run("run", job(map[string]any{"source": hostile}), "--check", "--state", "out/state.json")
	for _, field := range []string{"format", "timeout", "compress", "cluster_size", "nfc_buffers", "thumbprint", hostile} {
		f.run("run", job(map[string]any{field: hostile}), "--check", "--state", "out/state.json")
	}
	f.run("run", job(nil), "--only", hostile+"x")
	f.run("run", job(nil), "--progress", "json", "--state", "out/state.json")
	f.write("made/r.json", `{"version":1,"counts":{},"jobs":[{"name":"\u009b31m\u001b","status":"ok","started":"2026-01-01T00:00:00Z"}]}`)
	f.run("run", job(nil), "--merge-reports", "made")
}

// hostileServer starts an NBD server whose names and texts are all hostile, and returns
// its address.
func hostileServer(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				hostileHandshake(c)
			}()
		}
	}()
	return l.Addr().String()
}

func hostileHandshake(c net.Conn) {
	const (
		optList                        = 3
		ack, server                    = 1, 2
		unsupported, unknown, replying = 1<<31 + 1, 1<<31 + 6, 0x3e889045565a9
	)
	if _, err := io.WriteString(c, "NBDMAGICIHAVEOPT\x00\x03"); err != nil {
		return
	}
	var flags uint32
	if wire.Read(c, wire.BigEndian, &flags) != nil {
		return
	}
	for {
		var option struct {
			Magic       uint64
			Kind, Bytes uint32
		}
		if wire.Read(c, wire.BigEndian, &option) != nil || option.Bytes > 1<<16 {
			return
		}
		if _, err := io.CopyN(io.Discard, c, int64(option.Bytes)); err != nil {
			return
		}
		reply := func(kind uint32, data string) {
			b := wire.BigEndian.AppendUint64(nil, replying)
			for _, n := range []uint32{option.Kind, kind, uint32(len(data))} {
				b = wire.BigEndian.AppendUint32(b, n)
			}
			_, _ = c.Write(append(b, data...)) // the next read fails too
		}
		switch option.Kind {
		case 2: // abort
			reply(ack, "")
			return
		case optList:
			reply(server, string(wire.BigEndian.AppendUint32(nil, uint32(len(hostile))))+hostile+hostile)
			reply(ack, "")
		case 6, 7: // info, go
			reply(unknown, hostile)
		default:
			reply(unsupported, hostile)
		}
	}
}

// TestNamesThatAreNotUTF8 checks that sources and targets may have names that are not
// UTF-8.
func TestNamesThatAreNotUTF8(t *testing.T) {
	f := &hostileFolder{t, t.TempDir()}
	f.write("a\xe4.img", "data of a disk")
	cmd := command(t, "copy", "a\xe4.img", "b\xe4.img", "--report", "r\xe4.json", "--progress", "none")
	cmd.Dir = f.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"b\xe4.img", "r\xe4.json"} {
		if _, err := os.Stat(filepath.Join(f.dir, name)); err != nil {
			t.Error(err)
		}
	}
}

// TestForeignNamesStayReadable checks that names in other scripts are printed
// unchanged.
func TestForeignNamesStayReadable(t *testing.T) {
	f := &hostileFolder{t, t.TempDir()}
	name := f.write("ümlaut 日本.img", "data of a disk")
	cmd := command(t, "info", name)
	cmd.Dir = f.dir
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), name) {
		t.Errorf("%v\n%s", err, out)
	}
}
