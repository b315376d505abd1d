package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// The tests in this file and in guide_peers_test.go run the commands of README.md and of
// docs/guide. In a page,
//
//   - a block "console" has commands after "$ " and their output. The output must be as the page says,
//     except for times, rates and names made at random. A line "..." stands for any lines.
//   - a block "sh" has commands whose output does not matter.
//   - <!-- file: NAME --> before a block makes its text the file NAME, and nothing is run.
//   - <!-- not run: REASON --> before a block "console" or "sh" says why a test cannot run it.
//
// A command must succeed unless the next one is "echo $?". All blocks of a page run in one shell,
// in a folder that guideFixture fills. With the environment variable UPDATE_GUIDE=1, the test
// writes the output that it gets into the pages.

// guidePages are the pages whose blocks need the simulated server. The value is its inventory.
var guidePages = map[string]string{
	"README.md":          guideInventory, // of the repository: that of the guide has no commands
	"vsphere.md":         guideInventory,
	"nfc.md":             guideInventory,
	"night-batch.md":     guideInventory,
	"coming-from.md":     guideInventory,
	"troubleshooting.md": guideInventory,
	"security.md":        guideInventory,
	"performance.md":     guideInventory,
}

const guideInventory = `
host esx1.example.com
vm web01 folder=prod disks=2 size=64MiB
vm db01 folder=prod disks=1 size=256MiB tracking
vm 'old server' power=off disks=1 size=16MiB
disk db01 size=8MiB mode=independent_persistent
snapshot db01 'before the update'
`

// guide is a folder and an environment in which commands of a page run.
type guide struct {
	dir         string
	environment []string
	server      []string          // the beginning of the command line that runs the shell; may be empty
	toReal      *strings.Replacer // what pages say -> what the test has
	toPage      *strings.Replacer
}

func TestGuide(t *testing.T) {
	needGuide(t)
	pages, err := filepath.Glob("../../docs/guide/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	for _, path := range append(pages, "../../README.md") {
		name := filepath.Base(path)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		blocks := guideBlocks(t, name, string(text))
		if !slices.ContainsFunc(blocks, func(b guideBlock) bool { return b.runs() }) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuide(t, guidePages[name], !strings.Contains(string(text), "\n$ vddkcp profile add vc1 "), 20)
			if name == "without-vsphere.md" {
				g.server = []string{buildServe(t), "-nfc", "-run"}
			}
			if name == "go-program.md" {
				g.toReal = strings.NewReplacer("=./vddkcp", "="+must(filepath.Abs("../..")))
				// With another home, go would download all modules and compile everything again.
				for _, name := range []string{"GOCACHE", "GOMODCACHE"} {
					g.environment = append(g.environment, name+"="+strings.TrimSpace(peer.Run(t, "go", "env", name)))
				}
			}
			updated := g.check(t, name, blocks, string(text))
			if os.Getenv("UPDATE_GUIDE") != "" && updated != string(text) {
				if err := os.WriteFile(path, []byte(updated), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// guideName is the name of the folder in the pages. It is as long as the names of guideFolder, so
// that the columns of tables stay aligned.
const guideName = "/backup/images"

// guideFolder returns a new folder.
func guideFolder(t *testing.T) string {
	t.Helper()
	dir := fmt.Sprintf("/tmp/%09d", rand.IntN(1e9))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// buildServe builds the simulated server of "make try" and returns its path.
func buildServe(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "serve")
	peer.Run(t, "go", "build", "-o", path, "../../vsphere/vspheretest/serve")
	return path
}

// TestTry runs the shell of "make try". TestGuide runs the commands of its page.
func TestTry(t *testing.T) {
	needGuide(t)
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil || !strings.Contains(string(makefile), "-run ./scripts/try") {
		t.Fatalf("make try does not run scripts/try: %v", err)
	}
	c := exec.Command(buildServe(t), "-nfc", "-run", "./scripts/try")
	c.Dir = "../.."
	c.Env = append(os.Environ(), "SHELL=/bin/sh", "VDDKCP_PROFILE=mine", "TMPDIR="+t.TempDir(), "PATH="+filepath.Dir(must(binary()))+":"+os.Getenv("PATH"))
	c.Stdin = strings.NewReader("vddkcp vm web01 images/ && ls images && exit 7\n")
	out, err := c.CombinedOutput()
	if c.ProcessState.ExitCode() != 7 || !strings.Contains(string(out), "web01-disk2.raw\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

// needGuide skips the test if a program that the pages use is missing.
func needGuide(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("runs the examples of docs/guide")
	}
	for _, program := range []string{"bash", "gcc", "qemu-img", "qemu-nbd", "nbdkit", "nbdcopy", "nbdinfo", "jq"} {
		if _, err := exec.LookPath(program); err == nil {
			continue
		}
		if os.Getenv("CI") != "" {
			t.Fatalf("the examples of docs/guide need %s", program)
		}
		t.Skipf("the examples of docs/guide need %s", program)
	}
}

// newGuide prepares a folder, whose disks have 4*mib MiB of data. If inventory is not empty, it
// starts a simulated server. With withProfile, there is the profile vc1 for this server.
func newGuide(t *testing.T, inventory string, withProfile bool, mib int) *guide {
	t.Helper()
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	g := &guide{dir: guideFolder(t), toReal: strings.NewReplacer()}
	g.toPage = strings.NewReplacer(g.dir, guideName)
	home := t.TempDir()
	g.environment = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+filepath.Join(home, ".config"), "XDG_STATE_HOME="+filepath.Join(home, ".state"),
		"LC_ALL=C.UTF-8", "PATH="+filepath.Dir(program)+":"+filepath.Dir(testTool(t, "govc"))+":"+os.Getenv("PATH"))
	guideFixture(t, g.dir, mib)
	if inventory != "" {
		g.serve(t, home, inventory, withProfile)
	}
	return g
}

// serve starts a simulated server with a library for VDDK.
func (g *guide) serve(t *testing.T, home, inventory string, withProfile bool) {
	t.Helper()
	program := must(binary())
	if err := installWorker(filepath.Dir(program)); err != nil {
		t.Fatal(err)
	}
	options, err := vspheretest.Parse(inventory, func(image string) string { return image })
	if err != nil {
		t.Fatal(err)
	}
	options.LibDir, options.Dir = filepath.Join(home, "vmware-vix-disklib-distrib"), t.TempDir()
	if err := compile("../../vddk/testlib/build", options.LibDir); err != nil {
		t.Fatal(err)
	}
	s, err := vspheretest.Start(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	files := map[string]string{filepath.Join(g.dir, "vc1.password"): s.Password + "\n"}
	if withProfile {
		files[filepath.Join(home, ".config/vddkcp/config.json")] = fmt.Sprintf(
			`{"servers": {"vc1": {"server": %q, "port": %d, "user": %q, "password": "+vc1.password", "thumbprint": %q, "libdir": %q}}}`,
			s.Host, s.Port, s.User, s.Thumbprint(), options.LibDir)
		files[filepath.Join(home, ".config/vddkcp/vc1.password")] = s.Password + "\n"
	}
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	moref, err := s.Command("moref", "web01")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(int(s.Port))
	g.environment = append(g.environment, "GOVC_INSECURE=1", "GOVC_URL="+s.URL.String())
	g.toReal = strings.NewReplacer(
		"server=vc.example.com", "server="+s.Host+" port="+port,
		"--server vc.example.com", "--server "+s.Host+" --port "+port,
		"VDDKCP_SERVER=vc.example.com", "VDDKCP_PORT="+port+" VDDKCP_SERVER="+s.Host,
		"vc.example.com", s.Host+":"+port,
		"backup@vsphere.local", s.User, "moref=vm-16", "moref="+strings.TrimSpace(moref),
		"AB:CD:EF:..", s.Thumbprint(), "/opt/vmware-vix-disklib-distrib", options.LibDir)
	g.toPage = strings.NewReplacer(s.Host+":"+port, "vc.example.com", s.Host, "vc.example.com", port, "443", s.User, "backup@vsphere.local",
		strings.TrimSpace(moref), "vm-16", s.Thumbprint(), "AB:CD:EF:..", s.ThumbprintSHA1(), "12:34:56:..", options.LibDir, "/opt/vmware-vix-disklib-distrib",
		g.dir, guideName, home, "/home/backup")
}

// guideBlock is a block of code of a page.
type guideBlock struct {
	lang, file string
	notRun     string // why a test cannot run the block
	first, end int    // its lines in the page, from 0
	lines      []string
}

func (b guideBlock) runs() bool {
	return (b.lang == "console" || b.lang == "sh") && b.notRun == "" && b.file == ""
}

var guideMark = regexp.MustCompile(`^<!-- (not run|file): (.+) -->$`)

// guideBlocks returns the blocks of code of a page.
func guideBlocks(t *testing.T, page, text string) []guideBlock {
	t.Helper()
	var blocks []guideBlock
	var mark []string
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		if m := guideMark.FindStringSubmatch(lines[i]); m != nil {
			mark = m
			continue
		}
		lang, ok := strings.CutPrefix(lines[i], "```")
		if !ok {
			if lines[i] != "" {
				mark = nil
			}
			continue
		}
		b := guideBlock{lang: lang, first: i + 1}
		for i++; i < len(lines) && lines[i] != "```"; i++ {
			b.lines = append(b.lines, lines[i])
		}
		b.end = i
		switch {
		case mark == nil:
		case mark[1] == "file":
			b.file = mark[2]
		default:
			b.notRun = mark[2]
			t.Logf("%s:%d: not run: %s", page, b.first, b.notRun)
		}
		mark = nil
		blocks = append(blocks, b)
	}
	return blocks
}

// guideCommand is a command of a block and the output that the page shows.
type guideCommand struct {
	block, line int // the number of the block, and of the line in the page, from 0
	text        string
	mayFail     bool
	output      []string
	after       int // the line in the page after the output
}

// commands returns the commands of the blocks that run.
func guideCommands(blocks []guideBlock) []guideCommand {
	var all []guideCommand
	for n, b := range blocks {
		if b.file != "" {
			all = append(all, guideCommand{block: n, line: b.first, after: b.first,
				text: fmt.Sprintf("mkdir -p '%s' && cat >'%s' <<'END OF THE FILE'\n%s\nEND OF THE FILE", filepath.Dir(b.file), b.file, strings.Join(b.lines, "\n"))})
		}
		if !b.runs() {
			continue
		}
		for i := 0; i < len(b.lines); i++ {
			c := guideCommand{block: n, line: b.first + i}
			text, shown := strings.CutPrefix(b.lines[i], "$ ")
			for c.text = text; strings.HasSuffix(c.text, `\`) && i+1 < len(b.lines); {
				i++
				c.text += "\n" + strings.TrimPrefix(b.lines[i], "> ")
			}
			for shown && i+1 < len(b.lines) && !strings.HasPrefix(b.lines[i+1], "$ ") {
				i++
				c.output = append(c.output, b.lines[i])
			}
			c.after = b.first + i + 1
			if strings.TrimSpace(c.text) != "" {
				all = append(all, c)
			}
		}
	}
	for i := 0; i+1 < len(all); i++ {
		all[i].mayFail = all[i+1].text == "echo $?"
	}
	return all
}

// check runs the commands of a page. It returns the page with the output that it got.
func (g *guide) check(t *testing.T, page string, blocks []guideBlock, text string) string {
	t.Helper()
	commands := guideCommands(blocks)
	outputs, statuses := g.run(t, commands)
	lines := strings.Split(text, "\n")
	for i := len(commands) - 1; i >= 0; i-- {
		c := commands[i]
		if i >= len(statuses) {
			t.Errorf("%s:%d: the shell ended before this command: %s", page, c.line+1, c.text)
			continue
		}
		if statuses[i] != 0 && !c.mayFail {
			t.Errorf("%s:%d: %s: exit status %d\n%s", page, c.line+1, c.text, statuses[i], strings.Join(outputs[i], "\n"))
		}
		want, got := guideLines(c.output), guideLines(outputs[i])
		if blocks[c.block].lang != "console" || slices.Equal(want, got) {
			continue
		}
		if os.Getenv("UPDATE_GUIDE") != "" && !slices.Contains(want, "...") {
			lines = slices.Concat(lines[:c.after-len(c.output)], outputs[i], lines[c.after:])
			continue
		}
		if matchLines(dropProgress(want), dropProgress(got)) {
			continue
		}
		t.Errorf("%s:%d: %s: the output is\n%s\nthe page has\n%s", page, c.line+1, c.text, strings.Join(outputs[i], "\n"), strings.Join(c.output, "\n"))
	}
	return strings.Join(lines, "\n")
}

// run runs the commands in one shell and returns the output and the exit status of each.
func (g *guide) run(t *testing.T, commands []guideCommand) (outputs [][]string, statuses []int) {
	t.Helper()
	const mark = "\x1e"
	var script strings.Builder
	script.WriteString("trap 'kill $(jobs -p) 2>/dev/null' EXIT\n")
	for _, c := range commands {
		fmt.Fprintf(&script, "%s\nguide_status=$?; printf '%s%%d\\n' $guide_status; (exit $guide_status)\n", g.toReal.Replace(c.text), mark)
	}
	file := filepath.Join(t.TempDir(), "page.sh")
	if err := os.WriteFile(file, []byte(script.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	words := append([]string{"timeout", "--kill-after=10", "300"}, g.server...)
	words = append(words, "bash --norc "+file)
	if len(g.server) == 0 {
		words = append(words[:3], "bash", "--norc", file)
	}
	sh := exec.Command(words[0], words[1:]...)
	sh.Dir, sh.Env = g.dir, g.environment
	out, _ := sh.CombinedOutput() // the status of each command is in the output
	for rest := string(out); ; {
		output, after, ok := strings.Cut(rest, mark)
		if !ok {
			if strings.TrimSpace(rest) != "" {
				t.Log("after the last command: " + rest)
			}
			return outputs, statuses
		}
		status, after, _ := strings.Cut(after, "\n")
		n, err := strconv.Atoi(status)
		if err != nil {
			t.Fatalf("status %q of a command", status)
		}
		rest = after
		var lines []string
		if output = strings.TrimSuffix(output, "\n"); output != "" {
			lines = strings.Split(guideTime.ReplaceAllString(g.toPage.Replace(output), ""), "\n")
		}
		outputs, statuses = append(outputs, lines), append(statuses, n)
	}
}

// guideTime is the time of a line of the log, which vddkcp does not print on a terminal.
var guideTime = regexp.MustCompile(`(?m)^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(Z|[+-][0-9:]{5}) `)

// guideJob is a row of the table of run --status.
var guideJob = regexp.MustCompile(`^[a-z0-9-]+-disk[0-9] +([0-9]+%|plan|copy|verify|finish) `)

// guideVaries are the parts of an output that differ between two runs.
var guideVaries = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(` in (less than )?[0-9.:]+ ?(ms|s|min|m|h)( [0-9.]+ ?(s|min|m))?( \([^)]*/s\))?`), " in DURATION"},
	{regexp.MustCompile(`[0-9.]+ [KMGT]?i?B/s`), "RATE"},
	{regexp.MustCompile(`[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9:.]+)?(Z| UTC)?`), "TIME"},
	{regexp.MustCompile(`\b[0-9.]+ ?(ms|s|m|h)\b( ?[0-9.]+ ?(s|m)\b)?`), "DURATION"},
	{regexp.MustCompile(`127\.0\.0\.1:[0-9]+`), "ADDRESS"},
	{regexp.MustCompile(`TCP port [0-9]{5}`), "TCP port N"},
	{regexp.MustCompile(`(cannot resolve the name [^ :]+): .*`), "$1"},
	{regexp.MustCompile(`([0-9A-F]{2}:){19,31}[0-9A-F]{2}`), "THUMBPRINT"},
	{regexp.MustCompile(`vddkcp-[0-9a-f]{16}`), "vddkcp-ID"},
	{regexp.MustCompile(`\b(vm|snapshot)-[0-9]+\b`), "$1-N"},
	{regexp.MustCompile(`[0-9a-f]{64}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "HEX"},
	{regexp.MustCompile(`\bCID: +[0-9a-f]{8}`), "CID"},
	{regexp.MustCompile(`(at byte |from=)[0-9]+`), "${1}N"},
	{regexp.MustCompile(`done=[0-9.]+ [KMG]iB`), "done=SIZE"},
	{regexp.MustCompile(`"(seconds|source|encoders|target|rate_limit|host_budget|bytes_read)": [0-9.e-]+`), `"$1": N`},
	{regexp.MustCompile(`^(allocated: .*) \([0-9]+ bytes\)`), "$1"}, // file systems allocate more or less
	{regexp.MustCompile(`process [0-9]+ on [^ ,]+`), "process N"},
	{regexp.MustCompile(`(ReadAsync +)[0-9]+ +[0-9]+ `), "$1 N N "},
	{regexp.MustCompile(`\([^()]*[0-9]+%[^()]*\)`), "(PERCENT)"},
}

// dropProgress returns lines without those of the progress display, of which a slow machine prints
// more.
func dropProgress(lines []string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return l == "PROGRESS" })
}

// guideLines returns lines without what differs between two runs. A line of the progress display
// becomes "PROGRESS".
func guideLines(lines []string) []string {
	var result []string
	for _, l := range lines {
		switch {
		case regexp.MustCompile(`^(plan|copy|verify|finish): `).MatchString(l):
			l = "PROGRESS"
		case strings.HasPrefix(l, "vddkcp: stopping"):
			l = "STOPPING"
		case guideJob.MatchString(l):
			l = "JOB"
		case regexp.MustCompile(`^[0-9]+ done, [0-9]+ running`).MatchString(l):
			l = "COUNTS"
		case strings.HasPrefix(l, "estimate: "): // which limit binds depends on the load of this machine
			l = "ESTIMATE"
		case strings.HasPrefix(l, "updated "):
			l = "UPDATED"
		case strings.Contains(l, ", continued at "):
			l = "CONTINUED"
		}
		for _, v := range guideVaries {
			l = v.pattern.ReplaceAllString(l, v.with)
		}
		result = append(result, strings.Join(strings.Fields(l), " "))
	}
	return result
}

// matchLines reports whether got are the lines want, of which "..." stands for any lines.
func matchLines(want, got []string) bool {
	if len(want) == 0 {
		return len(got) == 0
	}
	if want[0] == "..." {
		for i := range len(got) + 1 {
			if matchLines(want[1:], got[i:]) {
				return true
			}
		}
		return false
	}
	return len(got) > 0 && want[0] == got[0] && matchLines(want[1:], got[1:])
}

func TestMatchLines(t *testing.T) {
	for _, test := range []struct {
		want, got string
		matches   bool
	}{
		{"", "", true}, {"a", "a", true}, {"a", "b", false}, {"a", "", false}, {"", "a", false},
		{"...", "", true}, {"...", "a b", true}, {"a ... d", "a b c d", true}, {"a ... d", "a d e", false}, {"... b ... d", "a b c b d", true},
	} {
		if got := matchLines(strings.Fields(test.want), strings.Fields(test.got)); got != test.matches {
			t.Errorf("%q, %q: %v", test.want, test.got, got)
		}
	}
}

// guideFixture makes the files that pages copy: web01.vmdk, which has a size of 1 GiB,
// appliance.ova with two disks, and the empty folder images. The data has four pieces of mib MiB.
func guideFixture(t *testing.T, dir string, mib int) {
	t.Helper()
	made := filepath.Join(t.TempDir(), "made")
	raw := filepath.Join(made, "disk.raw")
	if err := os.MkdirAll(made, 0o755); err != nil {
		t.Fatal(err)
	}
	random(t, filepath.Join(made, "data"), mib<<20)
	sh(t, `cd %s && truncate -s 1G disk.raw && for at in 1 200 201 700; do dd if=data of=disk.raw bs=1M seek=$((at + at %% 2 * 20)) conv=notrunc status=none; done &&
		qemu-img convert -O vmdk disk.raw %s/web01.vmdk &&
		truncate -s 64M data && qemu-img convert -O vmdk -o subformat=streamOptimized data disk1.vmdk && qemu-img convert -O vmdk -o subformat=streamOptimized data disk2.vmdk`, made, dir)
	if err := os.WriteFile(filepath.Join(made, "appliance.ovf"), []byte(guideOVF), 0o644); err != nil {
		t.Fatal(err)
	}
	sh(t, `cd %s && for f in appliance.ovf disk1.vmdk disk2.vmdk; do echo "SHA256($f)= $(sha256sum <$f | cut -d' ' -f1)"; done >appliance.mf &&
		tar -cf %s/appliance.ova appliance.ovf appliance.mf disk1.vmdk disk2.vmdk && mkdir %s/images`, made, dir, dir)
	if err := os.Remove(raw); err != nil {
		t.Fatal(err)
	}
}

const guideOVF = `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References>
    <File ovf:href="disk1.vmdk" ovf:id="file1"/>
    <File ovf:href="disk2.vmdk" ovf:id="file2"/>
  </References>
  <DiskSection>
    <Info>Virtual disk information</Info>
    <Disk ovf:capacity="67108864" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
    <Disk ovf:capacity="67108864" ovf:diskId="vmdisk2" ovf:fileRef="file2" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
</Envelope>
`
