package packaging

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// startDebootstrap makes a new Debian 12 with man and bash-completion, as a tar file. The result
// waits for it. The tar file stays in the user's cache folder, because debootstrap takes a minute.
func startDebootstrap(t *testing.T) (wait func() (archive string, err error)) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(cache, "vddkcp", "debian12-man.tar")
	if _, err := os.Stat(archive); err == nil {
		return func() (string, error) { return archive, nil }
	}
	root := t.TempDir()
	script := `set -e
debootstrap --variant=minbase --include=man-db,bash-completion bookworm "$1" http://deb.debian.org/debian
rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/*
mkdir -p "$(dirname "$2")"
tar --create --file "$2.partial" --directory "$1" .
mv "$2.partial" "$2"`
	ended := make(chan struct{})
	var out []byte
	go func() {
		defer close(ended)
		out, err = exec.Command("sh", "-c", script, "sh", root, archive).CombinedOutput()
	}()
	t.Cleanup(func() { <-ended }) // its folder is removed only then
	return func() (string, error) {
		<-ended
		if err != nil {
			return "", fmt.Errorf("debootstrap: %w\n%s", err, out)
		}
		return archive, nil
	}
}

// testDeb installs a deb in a new system, uses it there, and removes it.
func testDeb(t *testing.T, deb string, system func() (string, error)) {
	archive, err := system()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	peer.Run(t, "tar", "--extract", "--file", archive, "--directory", root)
	inside := func(command string) string {
		t.Helper()
		// The folders disappear with the name space, when the command has ended.
		mount := `mount --make-rprivate /; mount -t proc none "$1/proc"; mount --bind /dev "$1/dev"; exec chroot "$1" /bin/bash -ec "$2"`
		cmd := exec.Command("unshare", "--mount", "sh", "-ec", mount, "sh", root, command)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "MANWIDTH=80"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		return string(out)
	}
	testLinks(t, tarFiles(t, strings.NewReader(peer.Run(t, "dpkg-deb", "--fsys-tarfile", deb))), "usr/share/doc/vddkcp/")
	peer.Run(t, "cp", deb, filepath.Join(root, "root/vddkcp.deb"))
	inside("dpkg --install /root/vddkcp.deb")
	if got := inside("vddkcp --version"); !strings.HasPrefix(got, "vddkcp "+described+" (go") {
		t.Errorf("vddkcp --version: %s", got)
	}
	facts := inside("vddkcp version --json")
	if !strings.Contains(facts, `"commit": "`+commit+`"`) || !regexp.MustCompile(`"worker_sha256": "[0-9a-f]{64}"`).MatchString(facts) {
		t.Errorf("vddkcp version --json: %s", facts)
	}
	for page, want := range map[string]string{"vddkcp": "NAME", "vddkcp-run": "--resume", "5 vddkcp-jobs": "limits"} {
		if got := inside("man " + page + " | col -b 2>/dev/null || man " + page); !strings.Contains(got, want) {
			t.Errorf("man %s has no %q:\n%s", page, want, got)
		}
	}
	if got := inside("whatis vddkcp-export"); !strings.HasPrefix(got, "vddkcp-export (1)") {
		t.Errorf("whatis vddkcp-export: %s", got)
	}
	got := inside(`source /usr/share/bash-completion/bash_completion
_completion_loader vddkcp || [ $? = 124 ] # the status asks bash to try again
COMP_WORDS=(vddkcp vers) COMP_CWORD=1 COMP_LINE='vddkcp vers' COMP_POINT=11
function=$(complete -p vddkcp | sed 's/.*-F \([^ ]*\) .*/\1/')
$function vddkcp vers vddkcp || true
echo "completed: ${COMPREPLY[*]}"`)
	if !regexp.MustCompile(`(?m)^completed: version *$`).MatchString(got) {
		t.Errorf("completion of \"vddkcp vers\": %s", got)
	}
	inside("cd /root; head -c 1M /bin/bash >disk.raw; vddkcp --verify disk.raw disk.qcow2")
	peer.Run(t, "qemu-img", "compare", filepath.Join(root, "root/disk.raw"), filepath.Join(root, "root/disk.qcow2"))
	if got := inside("find /etc/systemd -name '*vddkcp*'"); got != "" {
		t.Errorf("a unit is enabled after the installation: %s", got)
	}
	inside("dpkg --purge vddkcp")
	if got := inside("find /etc /usr /var/lib -name '*vddkcp*' -not -path '/var/lib/dpkg/*'"); got != "" {
		t.Errorf("the package left files: %s", got)
	}
}

// testRPM reads an rpm and installs its files in an empty folder.
func testRPM(t *testing.T, path string) {
	info := peer.Run(t, "rpm", "-qpi", path)
	for _, want := range []string{`Name +: vddkcp\n`, `Version +: ` + regexp.QuoteMeta(version) + `\n`, `Architecture: x86_64\n`, `License +: Apache-2.0\n`, `Build Host +: localhost\n`} {
		if !regexp.MustCompile(want).MatchString(info) {
			t.Errorf("rpm -qpi does not match %q:\n%s", want, info)
		}
	}
	list := peer.Run(t, "rpm", "-qpl", path)
	for _, want := range []string{"/etc/vddkcp/jobs", "/usr/bin/vddkcp", "/usr/lib/systemd/system/vddkcp-run@.service", "/usr/share/zsh/site-functions/_vddkcp",
		"/usr/share/bash-completion/completions/vddkcp", "/usr/share/fish/vendor_completions.d/vddkcp.fish", "/usr/share/man/man5/vddkcp-jobs.5.gz",
		"/usr/share/licenses/vddkcp/THIRD-PARTY-NOTICES", "/usr/share/vddkcp/jobs.schema.json"} {
		if !strings.Contains("\n"+list, "\n"+want+"\n") {
			t.Errorf("rpm -qpl has no %s:\n%s", want, list)
		}
	}
	// These folders belong to other packages, which may give them other permissions.
	for _, other := range []string{"/usr", "/usr/bin", "/usr/lib/systemd/system", "/usr/share/man/man1", "/etc"} {
		if strings.Contains("\n"+list, "\n"+other+"\n") {
			t.Errorf("the rpm owns %s", other)
		}
	}
	root := t.TempDir()
	peer.Run(t, "rpm", "--root", root, "--install", "--nodeps", "--noscripts", path)
	peer.Run(t, "rpm", "--root", root, "--verify", "--nodeps", "--noscripts", "vddkcp")
	if got := peer.Run(t, filepath.Join(root, "usr/bin/vddkcp"), "--version"); !strings.HasPrefix(got, "vddkcp "+described+" (go") {
		t.Errorf("vddkcp --version: %s", got)
	}
}
