// In place of the header that includes every module of OpenCV.
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
