package address

import (
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/usage"
)

var (
	// The expression url matches the beginning of a URL, SCHEME://.
	url = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9+.-]*)://`)
	// The expression unspaced matches a datastore path in which the space is missing:
	// "[DATASTORE]DIR/DISK.vmdk".
	unspaced = regexp.MustCompile(`(?is)^(\[[^/]+\])([^ ].*\.vmdk)$`)
)

// The type scheme describes a kind of address that other programs use: its beginnings in lower
// case, and hints for the user. In a hint, %s stands for the rest of the address after the
// beginning.
type scheme struct {
	begins                 []string
	what                   string
	sourceHint, targetHint string // for the two roles
}

const (
	download = "download it into a file first"
	upload   = "write to a local file, and upload the file"
	vmware   = `write "[DATASTORE] DIR/DISK.vmdk" with --server HOST --user USER --vm moref=ID`
	serve    = "serve the disk with qemu-nbd or nbdkit, and use the URI of this server: nbd://HOST:PORT"
)

var schemes = []scheme{
	{[]string{"http://", "https://", "ftp://", "ftps://"}, "vddkcp does not read from web servers or write to them", download + ", or serve it with nbdkit curl and write nbd://HOST:PORT", upload},
	{[]string{"s3://", "gs://", "az://", "swift://"}, "vddkcp does not read from object stores or write to them", download, upload},
	{[]string{"ssh://", "sftp://", "scp://", "rsync://"}, "vddkcp does not log in with SSH", `write "-" and pipe the disk into vddkcp: ssh HOST cat FILE | vddkcp - DST`, `write "-" and pipe the disk out of vddkcp: vddkcp SRC - | ssh HOST 'cat >FILE'`},
	{[]string{"vi://", "vpx://", "esx://", "esxi://", "vsphere://"}, "this is not how vddkcp names disks of VMware", vmware, "write to a file, because vddkcp does not copy disks to VMware hosts"},
	{[]string{"file://localhost/", "file:///"}, "vddkcp takes paths, not URLs of files", "write /%s", "write /%s"},
	{[]string{"file:"}, "vddkcp takes paths, not URLs of files", "write %s", "write %s"},
	{[]string{"nbd:"}, "this is how qemu names an NBD server, and vddkcp needs a URI", "write nbd://HOST:PORT/EXPORT, or nbd+unix:///EXPORT?socket=PATH", "write nbd://HOST:PORT/EXPORT, or nbd+unix:///EXPORT?socket=PATH"},
	{[]string{"rbd:", "rbd://"}, "vddkcp does not speak to Ceph", "map the image (rbd map POOL/IMAGE) and use the path of the block device", "map the image (rbd map POOL/IMAGE) and use the path of the block device"},
	{[]string{"json:", "fat:", "sheepdog:", "blkdebug:", "null-co:", "host_device:"}, "vddkcp does not support the protocols of qemu", serve, serve},
}

// The function foreign returns a *usage.Error if an address has a meaning for other programs only.
// The caller must have handled NBD URIs and VDDK addresses before, because they look similar.
func foreign(address string, role Role) error {
	lower := strings.ToLower(address)
	for _, s := range schemes {
		for _, begin := range s.begins {
			if !strings.HasPrefix(lower, begin) {
				continue
			}
			hint := s.sourceHint
			if role == Target {
				hint = s.targetHint
			}
			return foreignError(address, s.what, strings.ReplaceAll(hint, "%s", address[len(begin):]))
		}
	}
	if m := url.FindStringSubmatch(address); m != nil {
		return foreignError(address, "no address of vddkcp begins with "+m[1]+"://", "write a path, an NBD URI (nbd://HOST:PORT/EXPORT), or, for a disk of VMware, [DATASTORE] DIR/DISK.vmdk")
	}
	if m := unspaced.FindStringSubmatch(address); m != nil {
		return foreignError(address, "the path of a disk in a datastore needs a space after the ]", `write "`+m[1]+" "+m[2]+`"`)
	}
	return nil
}

func foreignError(address, what, hint string) error {
	return usage.New(address+": "+what, hint+"; a file of that name is ./"+address)
}
