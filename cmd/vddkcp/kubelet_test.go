package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// kubelet runs pods on this machine, as far as they concern vddkcp: with their
// volumes and nothing else below a root of their own, as their user, without
// privileges. It needs root.
type kubelet struct {
	t          *testing.T
	images     map[string]image             // by the name that containers have them by
	configMaps map[string]map[string]string // files by the name of the ConfigMap
	secrets    map[string]map[string]string // likewise
	claims     map[string]string            // folders by the name of the PersistentVolumeClaim
	extra      map[string]string            // folders of this machine that every container has, by their paths there
	env        []string                     // of every container
}

// image is what a container's root has: files or folders of this machine by
// their paths there, besides the C library, /proc and /dev.
type image struct {
	files      map[string]string
	entrypoint []string
}

// pod is the pod that the Job controller makes for an index of a Job.
func pod(job *kubeJob, index int) *kubePodSpec {
	spec := new(kubePodSpec)
	if text, err := json.Marshal(&job.Spec.Template.Spec); err != nil {
		panic(err)
	} else if err := json.Unmarshal(text, spec); err != nil { // a deep copy
		panic(err)
	}
	if mode := job.Spec.CompletionMode; mode != nil && *mode == "Indexed" {
		// By way of the downward API, in truth. kubernetes:
		// pkg/controller/job/indexed_job_utils.go, addCompletionIndexEnvVariables
		v := kubeEnvVar{Name: "JOB_COMPLETION_INDEX", Value: strconv.Itoa(index)}
		for _, list := range [][]kubeContainer{spec.InitContainers, spec.Containers} {
			for i := range list {
				list[i].Env = append(list[i].Env, v)
			}
		}
	}
	return spec
}

var reference = regexp.MustCompile(`\$\$|\$\([^)]*\)`)

// expand replaces $(NAME) by the variables of a container as the kubelet does:
// kubernetes.io/docs/reference, Container, "command". Unknown names are left
// unchanged.
func expand(word string, env []kubeEnvVar) string {
	return reference.ReplaceAllStringFunc(word, func(ref string) string {
		if ref == "$$" {
			return "$"
		}
		for _, v := range env {
			if ref == "$("+v.Name+")" {
				return v.Value
			}
		}
		return ref
	})
}

// containerCommand is what a container of an image executes.
func containerCommand(c *kubeContainer, entrypoint []string) []string {
	words := slices.Concat(c.Command, c.Args)
	if len(c.Command) == 0 {
		words = slices.Concat(entrypoint, c.Args)
	}
	for i := range words {
		words[i] = expand(words[i], c.Env)
	}
	return words
}

// run runs a pod to its end, and returns how its first container ended.
// While that runs, meanwhile is called with its process, where it is not nil.
func (k *kubelet) run(spec *kubePodSpec, meanwhile func(*os.Process)) result {
	k.t.Helper()
	volumes := map[string]string{}
	for i := range spec.Volumes {
		volumes[spec.Volumes[i].Name] = k.volume(&spec.Volumes[i], spec.SecurityContext)
	}
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		if r := k.container(spec, c, volumes, nil); r.exit != 0 {
			k.t.Fatalf("init container %s: exit status %d\n%s", c.Name, r.exit, r.stderr)
		}
	}
	return k.container(spec, &spec.Containers[0], volumes, meanwhile)
}

// volume returns the folder of a volume. It applies fsGroup as described in
// kubernetes.io/docs/tasks/configure-pod-container/security-context.
func (k *kubelet) volume(v *kubeVolume, security *kubePodSecurityContext) string {
	k.t.Helper()
	dir := k.t.TempDir()
	files, mode := map[string]string(nil), int32(0o644)
	switch {
	case v.PersistentVolumeClaim != nil:
		dir = k.claims[v.PersistentVolumeClaim.ClaimName]
		k.must(os.Chmod(dir, os.ModeSetgid|0o775))
	case v.EmptyDir != nil:
		k.must(os.Chmod(dir, os.ModeSetgid|0o777))
	case v.ConfigMap != nil:
		files = k.configMaps[v.ConfigMap.Name]
		if v.ConfigMap.DefaultMode != nil {
			mode = *v.ConfigMap.DefaultMode
		}
	case v.Secret != nil:
		files = k.secrets[v.Secret.SecretName]
		if v.Secret.DefaultMode != nil {
			mode = *v.Secret.DefaultMode
		}
	default:
		k.t.Fatalf("volume %s is of no kind that is known here", v.Name)
	}
	group := -1
	if security.FSGroup != nil {
		group = int(*security.FSGroup)
		mode |= 0o440
	}
	k.must(os.Chown(dir, 0, group))
	for name, text := range files {
		// The folder behind the links is replaced when an object changes.
		if err := os.Mkdir(filepath.Join(dir, "..1"), 0o755); err == nil {
			k.must(os.Symlink("..1", filepath.Join(dir, "..data")))
		}
		path := filepath.Join(dir, "..data", name)
		k.must(os.WriteFile(path, []byte(text), 0o600))
		k.must(os.Chmod(path, os.FileMode(mode)))
		k.must(os.Chown(path, 0, group))
		k.must(os.Symlink("..data/"+name, filepath.Join(dir, name)))
	}
	return dir
}

func (k *kubelet) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

// bindMount is a folder or a file of this machine, and where a container has it.
type bindMount struct {
	from, to string
	readOnly bool
}

func (k *kubelet) container(spec *kubePodSpec, c *kubeContainer, volumes map[string]string, meanwhile func(*os.Process)) result {
	k.t.Helper()
	img, ok := k.images[c.Image]
	if !ok {
		k.t.Fatalf("container %s: no image %s", c.Name, c.Image)
	}
	root := filepath.Join(k.t.TempDir(), "root")
	k.must(os.Mkdir(root, 0o755))
	mounts := []bindMount{{root, "/", false}, {"/proc", "/proc", false}, {"/dev", "/dev", false}}
	for _, dir := range []string{"/usr/lib", "/usr/lib64", "/lib", "/lib64"} {
		if target, err := os.Readlink(dir); err == nil {
			k.must(os.Symlink(target, root+dir))
		} else if _, err := os.Stat(dir); err == nil {
			mounts = append(mounts, bindMount{dir, dir, true})
		}
		k.must(os.MkdirAll(root+"/usr", 0o755))
	}
	for to, from := range img.files {
		mounts = append(mounts, bindMount{from, to, true})
	}
	for to, from := range k.extra {
		mounts = append(mounts, bindMount{from, to, false})
	}
	for _, m := range c.VolumeMounts {
		mounts = append(mounts, bindMount{volumes[m.Name], m.MountPath, m.ReadOnly})
	}
	for _, m := range mounts {
		fi, err := os.Stat(m.from)
		k.must(err)
		to := filepath.Join(root, m.to)
		if fi.IsDir() {
			k.must(os.MkdirAll(to, 0o755))
		} else {
			k.must(os.MkdirAll(filepath.Dir(to), 0o755))
			k.must(os.WriteFile(to, nil, 0o644))
		}
	}
	// Last, when nothing is to be made there any more.
	if ro := c.SecurityContext.ReadOnlyRootFilesystem; ro != nil && *ro {
		mounts[0].readOnly = true
	}

	words := containerCommand(c, img.entrypoint)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/"}, k.env...)
	for _, v := range c.Env {
		cmd.Env = append(cmd.Env, v.Name+"="+v.Value)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	security := spec.SecurityContext
	who := &syscall.Credential{Uid: uint32(*security.RunAsUser), Gid: uint32(*security.RunAsGroup)}
	if security.FSGroup != nil {
		who.Groups = []uint32{uint32(*security.FSGroup)}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: who}
	if err := startIn(cmd, root, mounts); err != nil {
		k.t.Fatalf("container %s: %v", c.Name, err)
	}
	if meanwhile != nil {
		meanwhile(cmd.Process)
	}
	r := ended(k.t, cmd, cmd.Wait(), &out)
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
		r.exit = 128 + int(status.Signal()) // as runtimes have it
	}
	k.t.Logf("%s\n%sexit status %d", strings.Join(words, " "), r.stderr, r.exit)
	return r
}

// startIn starts cmd where root has the mounts, without a way to more
// privileges. The first mount is the root itself.
func startIn(cmd *exec.Cmd, root string, mounts []bindMount) error {
	started := make(chan error)
	go func() {
		// Never unlocked: the thread ends with this goroutine, and its mounts with
		// the process that has them from it.
		runtime.LockOSThread()
		started <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("unshare mounts: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("make mounts private: %w", err)
			}
			for _, m := range mounts {
				if err := unix.Mount(m.from, filepath.Join(root, m.to), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
					return fmt.Errorf("mount %s at %s: %w", m.from, m.to, err)
				}
			}
			for _, m := range mounts {
				if m.readOnly {
					if err := unix.Mount("", filepath.Join(root, m.to), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
						return fmt.Errorf("make %s read-only: %w", m.to, err)
					}
				}
			}
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				return fmt.Errorf("no new privileges: %w", err)
			}
			return cmd.Start()
		}()
	}()
	return <-started
}

// podFailed is what a Job does about a pod that failed: Ignore (another pod, and
// it does not count), FailIndex, FailJob, or Count (another pod, so many times as
// the limit of the index says). kubernetes.io/docs/concepts/workloads/controllers/job,
// "Pod failure policy".
func podFailed(policy *kubePodFailurePolicy, container string, exit int, conditions ...string) string {
	for _, rule := range policy.Rules {
		if on := rule.OnExitCodes; on != nil {
			if on.ContainerName != nil && *on.ContainerName != container {
				continue
			}
			listed := false
			for _, value := range on.Values {
				listed = listed || int(value) == exit
			}
			if listed == (on.Operator == "In") {
				return rule.Action
			}
			continue
		}
		for _, on := range rule.OnPodConditions {
			for _, c := range conditions {
				if on.Type == c && on.Status == "True" {
					return rule.Action
				}
			}
		}
	}
	return "Count"
}

func TestExpandIsTheKubelets(t *testing.T) {
	env := []kubeEnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "$(A)"}}
	for word, want := range map[string]string{
		"$(A)/4": "1/4", "x$(A)$(A)": "x11", "$(B)": "$(A)", "$$(A)": "$(A)", "$$$(A)": "$1",
		"$(C)": "$(C)", "$A": "$A", "$(A": "$(A", "$": "$", "${A}": "${A}",
	} {
		if got := expand(word, env); got != want {
			t.Errorf("%s became %s, want %s", word, got, want)
		}
	}
}

// A container of the example is as confined here as it would be there.
func TestKubeletConfines(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "cat", "cp")
	b := readKubernetesBatch(t)
	k := &kubelet{t: t, claims: map[string]string{b.claim.Name: t.TempDir()}, images: map[string]image{
		b.job.Spec.Template.Spec.Containers[0].Image: {files: map[string]string{"/usr/bin/cat": "/usr/bin/cat", "/usr/bin/cp": "/usr/bin/cp"}},
	}}
	p := pod(b.report, 0)
	p.Containers[0].Command = []string{"/usr/bin/cat", "/proc/self/status"}
	r := k.run(p, nil)
	for _, want := range []string{"Uid:\t107\t107\t107\t107\n", "Groups:\t107 \n", "CapEff:\t0000000000000000\n", "NoNewPrivs:\t1\n"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("no %q", want)
		}
	}
	for to, want := range map[string]string{"/images/x": "", "/x": "Read-only file system", "/usr/bin/cat": "Read-only file system"} {
		p.Containers[0].Command = []string{"/usr/bin/cp", "/proc/self/status", to}
		if r := k.run(p, nil); (r.exit == 0) != (want == "") || !strings.Contains(r.stderr, want) {
			t.Errorf("cp to %s: exit status %d\n%s", to, r.exit, r.stderr)
		}
	}
}

// waitFor waits until it is so.
func waitFor(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s after a minute", what)
		}
	}
}
