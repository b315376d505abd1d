package packaging

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// testImage reads the container image with skopeo and umoci, and runs it as a cluster would: as
// user 107, with a root folder that is only readable, and with the library in a mounted folder.
func testImage(t *testing.T, archive string) {
	for _, arch := range []string{"amd64", "arm64"} {
		var image struct {
			Architecture string
			Labels       map[string]string
		}
		out := peer.Run(t, "skopeo", "--override-arch", arch, "inspect", "oci-archive:"+archive)
		if err := json.Unmarshal([]byte(out), &image); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if image.Architecture != arch || image.Labels["org.opencontainers.image.version"] != version || image.Labels["org.opencontainers.image.revision"] != commit {
			t.Errorf("image for %s: %+v", arch, image)
		}
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "skopeo", "copy", "--quiet", "oci-archive:"+archive, "oci:"+dir+"/layout:image")
	peer.Run(t, "umoci", "unpack", "--image", dir+"/layout:image", dir+"/bundle")
	var bundle struct {
		Process struct {
			Args []string
			User struct{ UID, GID int }
		}
	}
	if err := json.Unmarshal(read(t, dir+"/bundle/config.json"), &bundle); err != nil {
		t.Fatal(err)
	}
	if p := bundle.Process; strings.Join(p.Args, " ") != "/usr/local/bin/vddkcp" || p.User.UID != 107 || p.User.GID != 107 {
		t.Errorf("the image runs %+v", p)
	}
	work, lib := filepath.Join(dir, "work"), filepath.Join(dir, "lib")
	peer.Run(t, "../vddk/testlib/build", lib)
	thumbprint := strings.Repeat("AB", 20)
	for path, text := range map[string]string{
		work + "/password":        "geheim\n",
		work + "/disk.raw":        strings.Repeat("0123456789abcdef", 1<<16),
		lib + "/disks/ds1/a.vmdk": strings.Repeat("fedcba9876543210", 1<<16),
		lib + "/vddktest.conf":    "user backup\npassword geheim\nport 1\nthumbprint " + strings.Join(pairs(thumbprint), ":") + "\n",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	peer.Run(t, "chown", "-R", "107:107", work, lib)
	script := `set -e
root=$1 work=$2 lib=$3 thumbprint=$4
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t tmpfs none "$root/opt"
mkdir "$root/opt/vmware-vix-disklib-distrib"
mount --bind "$lib" "$root/opt/vmware-vix-disklib-distrib"
mount --bind "$work" "$root/mnt"
mount -t proc none "$root/proc"
mount --bind /dev "$root/dev"
mount -o remount,bind,ro "$root"
as_qemu() { env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot --userspec=107:107 "$root" "$@"; }
inside() { as_qemu /usr/local/bin/vddkcp "$@"; }
inside --version
inside vddk
inside --verify /mnt/disk.raw /mnt/disk.qcow2
inside --server localhost --port 1 --user backup --password=+/mnt/password --vm moref=12 --thumbprint "$thumbprint" '[ds1] a.vmdk' /mnt/a.qcow2
if as_qemu /bin/sh -c ': >/usr/new' || as_qemu /bin/sh -c ': >/tmp/new'; then
	echo "the root folder is writable" >&2
	exit 1
fi`
	out, err := exec.Command("unshare", "--mount", "sh", "-c", script, "sh", dir+"/bundle/rootfs", work, lib, thumbprint).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"vddkcp " + described + " (go", "vddk_library_version="} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output has no %q:\n%s", want, out)
		}
	}
	if n := strings.Count(string(read(t, dir+"/bundle/rootfs/etc/ssl/certs/ca-certificates.crt")), "BEGIN CERTIFICATE"); n < 50 {
		t.Errorf("the image has %d certificates of authorities, want at least 50", n)
	}
	peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", work+"/disk.raw", work+"/disk.qcow2")
	peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", lib+"/disks/ds1/a.vmdk", work+"/a.qcow2")
}

// pairs returns the text in pieces of two letters.
func pairs(text string) (list []string) {
	for ; text != ""; text = text[2:] {
		list = append(list, text[:2])
	}
	return list
}
