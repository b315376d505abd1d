package raw

import (
	"os"
	"path/filepath"
	"strings"
)

// maxRelated limits the number of files that relatedFiles returns.
const maxRelated = 1 << 10

// relatedFiles returns the paths of files and devices that share content with a
// block device, so that writing to the device changes them. Such files are the
// file behind a loop device, the disk of a partition, the partitions of a disk,
// and the parts of an array or of a device of the device mapper. The parameter
// devices is a folder like /sys/dev/block. The parameter number consists of the
// device's numbers, in the form MAJOR:MINOR.
func relatedFiles(devices, number string) []string {
	dir, err := filepath.EvalSymlinks(filepath.Join(devices, number))
	if err != nil {
		return nil
	}
	var all []string
	for _, child := range folders(dir) {
		if readAttribute(child, "partition") != "" {
			all = append(all, deviceFile(child))
		}
	}
	return append(all, below(dir, 0)...)
}

// The function below returns the files and devices in which the data of a device are
// stored. The parameter dir is the folder of this device in sysfs. For each device
// that it finds, the function calls itself. The parameter depth says how many of its
// calls are already in progress.
func below(dir string, depth int) (all []string) {
	if depth > 16 {
		return nil
	}
	if path := readAttribute(dir, "loop/backing_file"); path != "" {
		all = append(all, path)
	}
	lower := folders(filepath.Join(dir, "slaves"))
	if readAttribute(dir, "partition") != "" {
		lower = append(lower, filepath.Dir(dir))
	}
	for _, device := range lower {
		if len(all) > maxRelated {
			break
		}
		all = append(all, deviceFile(device))
		all = append(all, below(device, depth+1)...)
	}
	return all
}

// The function folders returns the paths of the folders in dir. It includes the
// folders to which symbolic links in dir lead. The paths contain no symbolic links.
func folders(dir string) (all []string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		path, err := filepath.EvalSymlinks(filepath.Join(dir, e.Name()))
		if info, statErr := os.Stat(path); err == nil && statErr == nil && info.IsDir() {
			all = append(all, path)
		}
	}
	return all
}

// deviceFile returns the path in /dev of the device whose folder in sysfs is dir.
// If the name of a device contains /, sysfs has ! instead.
func deviceFile(dir string) string {
	return "/dev/" + strings.ReplaceAll(filepath.Base(dir), "!", "/")
}
